"""What a user does in the real page: finds the template, presses Run, watches, sees the images."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from browser import ComfyPage
from graphs import LEGACY, SHORT, node_of, shipped
from inprocess import PACK
from live import Server
from PIL import Image, ImageStat

TYPES = "() => window.app.graph.nodes.map(n => n.type)"


def open_quickstart(page: ComfyPage) -> None:
    page.browse_templates()
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_text(PACK, exact=True).first.click()
    page.page.wait_for_timeout(800)
    page.screenshot("templates")
    dialog.get_by_text("quickstart", exact=True).first.click()
    page.page.wait_for_function("() => window.app.graph.nodes.some(n => n.type === 'DOPSD_TrainLoRA')", timeout=20_000)
    page.page.wait_for_timeout(800)


def shown_image(server: Server, image: dict[str, Any]) -> Image.Image:
    query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
    return Image.open(io.BytesIO(server.get_bytes(f"/view?{query}"))).convert("RGB")


def test_the_template_is_found_loads_and_runs(page: ComfyPage, server: Server) -> None:
    open_quickstart(page)
    api = shipped("quickstart")
    saved = page.saved()["output"]
    assert {key: node["inputs"] for key, node in saved.items()} == {key: node["inputs"] for key, node in api.items()}
    assert sorted(page.page.evaluate(TYPES)) == sorted([*(n["class_type"] for n in api.values()), "MarkdownNote"])

    page.set_widget("DOPSD_TrainLoRA", "steps", SHORT["steps"])
    page.set_widget("DOPSD_TrainLoRA", "preview_every", 2)
    assert page.run(timeout=300) == "execution_success"
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(1500)
    page.screenshot("quickstart_done")

    shown = {detail["node"]: detail["output"].get("images", []) for kind, detail in page.heard() if kind == "executed"}
    for kind in ("DOPSD_LoadDataset", "DOPSD_TeacherPreview", "DOPSD_CompareLoRA", "LossGraphNode", "PreviewImage"):
        images = shown[node_of(api, kind)]
        assert images and all(max(ImageStat.Stat(shown_image(server, image)).stddev) > 10 for image in images), kind
    # on the canvas: the node that trained shows its last preview, the others their result
    drawn = page.page.evaluate(
        """() => Object.fromEntries(
            window.app.graph.nodes.map(n => [n.type, (n.imgs ?? []).map(i => i.naturalWidth)])
        )"""
    )
    for kind in ("DOPSD_TeacherPreview", "DOPSD_CompareLoRA", "DOPSD_TrainLoRA", "PreviewImage"):
        assert drawn[kind] and min(drawn[kind]) > 64, (kind, drawn)
    texts = [detail for kind, detail in page.heard() if kind == "progress_text"]
    assert any("6 steps done" in str(text) for text in texts)


@pytest.mark.long
def test_the_teacher_is_looked_at_alone(page: ComfyPage) -> None:
    """As help and recipes say: select Teacher Preview and press the triangle above it."""
    page.load_api(shipped("quickstart"))
    page.set_widget("DOPSD_TeacherPreview", "seed", 5)  # another run's answer may be in the cache
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.evaluate(
        "() => app.canvas.selectNode(app.graph.nodes.find(n => n.type === 'DOPSD_TeacherPreview'))",
    )
    # the bar hangs over the node, and where that is, one of the page's panels may lie over it
    page.page.get_by_label("Execute to selected output nodes").dispatch_event("click")
    assert page.wait_for_end(120) == "execution_success"
    graph = page.saved()["output"]
    ran = {graph[detail["node"]]["class_type"] for kind, detail in page.heard() if kind == "executed"}
    assert ran - {"DOPSD_LoadDataset"} == {"DOPSD_TeacherPreview"}  # the dataset may come from the cache


@pytest.mark.long
def test_cancel_from_the_page_and_run_again(page: ComfyPage) -> None:
    page.load_api(shipped("quickstart"))
    page.set_widget("DOPSD_TrainLoRA", "run_name", "from_the_page")
    page.start()
    page.page.wait_for_function(
        """() => window.heard.some(
            ([kind, detail]) => kind === 'progress_text' && /step ([2-9]|[1-9][0-9]+) of/.test(JSON.stringify(detail))
        )""",
        timeout=120_000,
    )
    page.page.evaluate("() => window.app.api.interrupt(null)")
    assert page.wait_for_end(30) == "execution_interrupted"
    page.set_widget("DOPSD_TrainLoRA", "steps", 12)
    assert page.run(timeout=200) == "execution_success"
    first = next(str(d) for kind, d in page.heard() if kind == "progress_text" and "of 12" in str(d))
    assert "step 1 of" not in first and "step 0 of" not in first


SEEN = """kind => {
    const node = window.app.graph.nodes.find(n => n.type === kind);
    return node.widgets.filter(w => !w.hidden && !w.options?.hidden).map(w => w.name);
}"""


def test_a_new_training_node_shows_few_widgets_with_real_values(page: ComfyPage) -> None:
    page.page.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('DOPSD_TrainLoRA')); }")
    assert page.page.evaluate(SEEN, "DOPSD_TrainLoRA") == [
        "run_name", "preset", "steps", "seed", "preview_every", "memory",
    ]  # fmt: skip
    widget = "name => app.graph.nodes[0].widgets.find(w => w.name === name).value"
    assert page.page.evaluate(widget, "steps") == 1500
    page.choose("DOPSD_TrainLoRA", "preset", "quick look")
    assert page.page.evaluate(widget, "steps") == 250


def test_a_preset_fills_in_the_settings(page: ComfyPage) -> None:
    page.page.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('DOPSD_TrainingSettings')); }")
    values = "() => Object.fromEntries(app.graph.nodes[0].widgets.map(w => [w.name, w.value]))"
    page.screenshot("training_settings")
    before = page.page.evaluate(values)
    assert (before["lr"], before["rank"], before["alpha"]) == (1e-4, 32, 64)
    page.choose("DOPSD_TrainingSettings", "preset", "paper")
    page.choose("DOPSD_TrainingSettings", "model_family", "FLUX.2-klein")
    after = page.page.evaluate(values)
    assert (after["lr"], after["rank"], after["alpha"], after["anchor_probability"]) == (2e-5, 64, 128, 0)
    assert after["targets"] != before["targets"]


def test_settings_of_an_old_graph_stay_visible(page: ComfyPage) -> None:
    """The quickstart as release 0.2 saved it, once with a rank of its own."""
    graph = json.loads((LEGACY / "quickstart.json").read_text(encoding="utf-8"))
    page.load_workflow(graph)
    assert "rank" not in page.page.evaluate(SEEN, "DOPSD_TrainLoRA")
    page.set_widget("DOPSD_TrainLoRA", "rank", 8)
    page.load_workflow(page.saved()["workflow"])
    page.screenshot("old_graph")
    assert "rank" in page.page.evaluate(SEEN, "DOPSD_TrainLoRA")
