"""Every shipped workflow: its two forms agree with the nodes, and it runs.

Z-Image's run on the demo model here; on small files under the names that they ask for all run in test_stock_files.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from graphs import node_of, shipped, shrunk, training
from inprocess import ROOT, ComfyUI
from PIL import Image, ImageStat
from runs import Run
from templates import MODELS

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
Z_IMAGE = ("z_image_turbo_teacher_preview", "z_image_turbo_train", "z_image_turbo_sample")
ON_DEMO = ("quickstart", *Z_IMAGE, "compare", "report_card")
KLEIN = ("klein_train", "klein_sample", "klein_edit_train", "klein_edit_sample")
KREA2 = ("krea2_teacher_preview", "krea2_train", "krea2_sample")
TRAINS = ("quickstart", "z_image_turbo_train")
DEMO_SLOTS = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2, "DOPSD_LoadTeacherVision": 3}


def on_the_demo_model(graph: dict) -> dict:
    """The workflow with the demo model in place of the loaders, small images and a short training."""
    loaders = {key: DEMO_SLOTS[node["class_type"]] for key, node in graph.items() if node["class_type"] in DEMO_SLOTS}
    graph = shrunk({key: node for key, node in graph.items() if key not in loaders})
    if loaders:
        graph["demo"] = {"class_type": "DOPSD_LoadDemoModels", "inputs": {}}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][name] = ["demo", loaders[value[0]]]
        if node["class_type"] == "DOPSD_TrainLoRA":
            node["inputs"]["preset"] = "demo model"
    return graph


def test_all_are_there_with_thumbnail_and_api_form() -> None:
    assert set(NAMES) == {*ON_DEMO, *KLEIN, *KREA2}
    for name in NAMES:
        assert (ROOT / "workflows" / f"{name}.jpg").stat().st_size > 5000
        assert shipped(name)
    assert {path.suffix for path in (ROOT / "workflows").iterdir() if path.is_file()} == {".json", ".jpg"}


def test_their_steps_are_those_of_their_preset(comfyui: ComfyUI) -> None:
    """What the recipes describe: a number in the widget goes before the preset's."""
    presets = comfyui.core("presets").PRESETS
    trained = [node["inputs"] for name in NAMES for node in shipped(name).values() if "run_name" in node["inputs"]]
    assert len(trained) == 5
    for inputs in trained:
        assert inputs["steps"] == presets[inputs["preset"]].steps, inputs["run_name"]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_schemas(comfyui: ComfyUI, name: str) -> None:
    """Each node exists, and its inputs in the API form are exactly the schema's (optional ones may be missing)."""
    for node in shipped(name).values():
        kind = comfyui.nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        known = kind.INPUT_TYPES()
        required, optional = set(known.get("required", {})), set(known.get("optional", {}))
        given = set(node["inputs"])
        assert required <= given <= required | optional, node


@pytest.mark.parametrize("name", NAMES)
def test_loaders_tell_where_the_files_are_had(name: str) -> None:
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] in DEMO_SLOTS:
            (model,) = node["properties"]["models"]
            assert model == MODELS[node["widgets_values"][0]]
            assert model["url"].endswith(f"/{model['directory']}/{model['name']}")


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another(name: str) -> None:
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    title = 30  # pixels above a node's place
    boxes = [(x, y - title, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in workflow["nodes"])]
    for (left, top, right, bottom), (x0, y0, x1, y1) in itertools.combinations(boxes, 2):
        assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top


@pytest.fixture(scope="module")
def lora_file(comfyui: ComfyUI) -> Path:
    graph = training("for-workflows", steps=1, preview_every=0)
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    folder = comfyui.output / "loras"
    folder.mkdir(exist_ok=True)
    target = folder / "my_concept_00001_.safetensors"
    shutil.copy(Path(run.value("train", 2)) / "lora.safetensors", target)
    return target


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in ("z_image_turbo_train", "report_card")))
        for name in ON_DEMO
    ],
)
def test_runs(comfyui: ComfyUI, name: str, lora_file: Path) -> None:
    graph = on_the_demo_model(shipped(name))
    if name in (*Z_IMAGE[:2], "report_card"):
        folder = comfyui.input / graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["folder"]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(comfyui.temp / "dopsd-demo-badge", folder)
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    require_images(comfyui, graph, run)
    if name in TRAINS:
        assert len(run.previews(node_of(graph, "DOPSD_TrainLoRA"))) == 3
        saved = Path(run.value(node_of(graph, "DOPSD_SaveLoRA")))
        assert saved.parent.resolve() == comfyui.output.resolve() / "loras"


def require_images(comfyui: ComfyUI, graph: dict, run: Run) -> None:
    """Each node that shows images has some, and none is of one colour."""
    kinds = ("PreviewImage", "SaveImage", "DOPSD_CompareLoRA", "DOPSD_TeacherPreview", "DOPSD_LoRAReportCard")
    shows = {key for key, node in graph.items() if node["class_type"] in kinds}
    assert shows and shows <= run.outputs.keys()
    for key in shows:
        for image in run.outputs[key]["images"]:
            assert varies(comfyui, image), (key, image)


def varies(comfyui: ComfyUI, image: dict[str, Any]) -> bool:
    folder = {"temp": comfyui.temp, "output": comfyui.output}[image["type"]] / image["subfolder"]
    return max(ImageStat.Stat(Image.open(folder / image["filename"]).convert("RGB")).stddev) > 10
