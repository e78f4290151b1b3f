"""Makes the README's pictures from a real run of the quickstart: python tests/comfyui/make_pictures.py

docs/graph.png        the graph in ComfyUI's page after the run
docs/training.gif     the previews of the run, one after another
workflows/quickstart.jpg  the last of them, for the template browser
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from browser import ComfyPage, launched
from inprocess import ROOT, new_base
from live import Server
from PIL import Image

SIZE = {"width": 2300, "height": 1240}


def training_gif(sheets: list[Image.Image], path: Path) -> None:
    """A second for each sheet, longer for the first and the last."""
    frames = [sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=128) for sheet in sheets]
    times = [1800, *[900] * (len(frames) - 2), 3500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)


def main() -> None:
    work = Path(tempfile.mkdtemp())
    server = Server(new_base(work), work / "server.log", threads=2)
    server.send("/api/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})  # text at any zoom
    try:
        with launched() as chromium:
            page = ComfyPage(chromium, server.url, work)
            page.page.set_viewport_size(SIZE)
            page.load_workflow(json.loads((ROOT / "workflows" / "quickstart.json").read_text()), "quickstart")
            end = page.run(timeout=900)
            if end != "execution_success":
                raise RuntimeError(server.log_tail())
            page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            page.page.wait_for_timeout(7000)  # until the message that it is done has gone
            with Image.open(page.screenshot("graph")) as shot:
                canvas = shot.convert("RGB").crop((60, 45, shot.width - 10, shot.height - 60))
                canvas.save(ROOT / "docs" / "graph.png", optimize=True)
            page.close()
        (previews,) = (server.output / "dopsd").glob("*/previews")
        sheets = [Image.open(path).convert("RGB") for path in sorted(previews.iterdir())]
        training_gif(sheets, ROOT / "docs" / "training.gif")
        sheets[-1].save(ROOT / "workflows" / "quickstart.jpg", quality=90)
    finally:
        server.stop()
    print("docs/graph.png, docs/training.gif and workflows/quickstart.jpg are new; look at them")


if __name__ == "__main__":
    main()
