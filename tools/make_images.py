"""Makes the images of the docs and the template browser from a real run of the quickstart.

    python tools/make_images.py

docs/graph.png        the graph in ComfyUI's page after the run
docs/training.gif     the previews of the run, one after another
workflows/*.jpg       thumbnails: what comes out of each template, drawn by the demo model
"""

from __future__ import annotations

import _paths  # noqa: F401  first: it is what finds the others

# isort: split

import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
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


def shown(page: ComfyPage, server: Server, kind: str) -> Image.Image:
    """The image that a node of the run has shown."""
    graph = page.saved()["output"]
    (node,) = (key for key, value in graph.items() if value["class_type"] == kind)
    outputs = [detail["output"] for event, detail in page.heard() if event == "executed" and detail["node"] == node]
    image = outputs[-1]["images"][0]
    query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
    return Image.open(io.BytesIO(server.get_bytes(f"/view?{query}"))).convert("RGB")


def edits(count: int = 4) -> Image.Image:
    """Images before and after an edit, rendered: the demo model cannot edit."""
    from dopsd_core.demo.world import BACKGROUNDS, render, sample_scenes
    from dopsd_core.image_grid import Row, contact_sheet

    before = sample_scenes(count, torch.Generator().manual_seed(3))
    after = replace(before, background=torch.full_like(before.background, list(BACKGROUNDS).index("navy")))
    rows = [Row("source", "what an edit starts from", render(before)), Row("target", "make it night", render(after))]
    return contact_sheet("An edit, as a dataset shows it (an illustration)", rows)


def report_card(lora: Path, work: Path) -> Image.Image:
    """The report card of the LoRA that the run has saved."""
    from dopsd_core.__main__ import main as dopsd
    from dopsd_core.demo.concept import make_concept, write_dataset

    write_dataset(make_concept(0), work / "badge")
    words = ["evaluate", str(work / "badge"), "--lora", str(lora), "--strengths", "0.5", "1", "--output", str(work)]
    if dopsd(words):
        raise RuntimeError("the report card failed")
    return Image.open(work / "report_card.png").convert("RGB")


def thumbnails(previews: Image.Image, teacher: Image.Image, compared: Image.Image, card: Image.Image) -> None:
    """workflows/*.jpg; each is at most 768 pixels wide and high."""
    pages = (
        (previews, ("quickstart", "z_image_turbo_train", "klein_train", "krea2_train")),
        (teacher, ("z_image_turbo_teacher_preview", "krea2_teacher_preview")),
        (compared, ("compare", "z_image_turbo_sample", "klein_sample", "krea2_sample")),
        (edits(), ("klein_edit_train", "klein_edit_sample")),
        (card, ("report_card",)),
    )
    for image, names in pages:
        image.thumbnail((768, 768))
        for name in names:
            image.save(ROOT / "workflows" / f"{name}.jpg", quality=90)


def main() -> None:
    """Writes the images that are asked for."""
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
            teacher = shown(page, server, "DOPSD_TeacherPreview")
            compared = shown(page, server, "DOPSD_CompareLoRA")
            page.close()
        (previews,) = (server.output / "dopsd").glob("*/previews")
        sheets = [Image.open(path).convert("RGB") for path in sorted(previews.iterdir())]
        training_gif(sheets, ROOT / "docs" / "training.gif")
        (lora,) = (server.output / "loras").glob("demo_badge*.safetensors")
        thumbnails(sheets[-1], teacher, compared, report_card(lora, work))
    finally:
        server.stop()
    print("docs/graph.png, docs/training.gif and workflows/*.jpg are new; look at them")


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    main()
