"""Workflows saved with release 0.2 still load, validate and run: all nine that it shipped, in the page's form and the
API's.

Every file that they load is there under its name, small and random (stock_files.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stock_files
from graphs import LEGACY, node_of, shipped, shrunk
from inprocess import ComfyUI
from runs import Run

NAMES = sorted(path.stem for path in LEGACY.glob("*.json"))
LORA_OF = {
    "z_image_turbo_sample": "z_image_turbo_train",
    "compare": "z_image_turbo_train",
    "klein_sample": "klein_train",
    "klein_edit_sample": "klein_edit_train",
}
"""A workflow that needs a LoRA, and the one that trains it."""
OFTEN = ("quickstart", "z_image_turbo_train", "z_image_turbo_sample")
"""Those that run without `make test-all` too."""
VERY_SHORT = {"steps": 2, "rollout_steps": 2, "probe_every": 2, "preview_every": 0}

Runner = Callable[[str], Run]


def node_info(comfyui: ComfyUI, graph: dict) -> dict[str, Any]:
    """What the server's /object_info says of the graph's nodes, as far as widgets go."""
    kinds = {node["class_type"]: comfyui.nodes.NODE_CLASS_MAPPINGS[node["class_type"]] for node in graph.values()}
    return {name: {"input": kind.INPUT_TYPES(), "output_node": False} for name, kind in kinds.items()}


def from_page(comfyui: ComfyUI, name: str) -> dict:
    """The graph that the page's form of a workflow stands for, with the nodes as they are now."""
    conversion = pytest.importorskip("comfy_cli.workflow_to_api", reason="COMFY-CLI IS MISSING: run `make comfyui`")
    workflow = json.loads((LEGACY / f"{name}.json").read_text(encoding="utf-8"))
    return conversion.convert_ui_to_api(workflow, node_info(comfyui, shipped(name, LEGACY)))


def remove_loras(comfyui: ComfyUI) -> None:
    """What was saved; the folder stays, since ComfyUI remembers that it was there."""
    for path in (comfyui.output / "loras").rglob("*.safetensors"):
        path.unlink()


@pytest.fixture(scope="module")
def run(comfyui: ComfyUI, stock: Callable[..., None]) -> Iterator[Runner]:
    """run(name): the run of that workflow with a very short training, done once."""
    stock()
    done: dict[str, Run] = {}
    remove_loras(comfyui)
    for folder, write in (("my_concept", stock_files.write_concept), ("my_edit", stock_files.write_edits)):
        shutil.rmtree(comfyui.input / folder, ignore_errors=True)
        write(comfyui.input / folder)
    shutil.copy(comfyui.input / "my_concept" / "snow.png", comfyui.input / "example.png")

    def execute(name: str) -> Run:
        if name not in done:
            done[name] = comfyui.execute(shrunk(shipped(name, LEGACY), **VERY_SHORT))
        return done[name]

    yield execute
    remove_loras(comfyui)


def test_all_nine_are_kept() -> None:
    assert len(NAMES) == 9 and sorted(path.stem for path in (LEGACY / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_form_gives_the_same_graph(comfyui: ComfyUI, name: str) -> None:
    """Widgets are saved by position: each value still reaches the input that it was saved for, and inputs that came
    since take their defaults."""
    converted, saved = from_page(comfyui, name), shipped(name, LEGACY)
    assert converted.keys() == saved.keys()
    for key, node in saved.items():
        optional = comfyui.nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES().get("optional", {})
        came_since = converted[key]["inputs"].keys() - node["inputs"].keys()
        defaults = {name: optional[name][1]["default"] for name in came_since}
        assert (converted[key]["class_type"], converted[key]["inputs"]) == (
            node["class_type"],
            {**node["inputs"], **defaults},
        )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name not in OFTEN)) for name in NAMES])
def test_runs(run: Runner, name: str) -> None:
    if name in LORA_OF:
        assert run(LORA_OF[name]).status == "success"
    result = run(name)
    assert result.status == "success", result.error
    if name not in {*LORA_OF, "z_image_turbo_teacher_preview"}:
        lora = result.value(node_of(shipped(name, LEGACY), "DOPSD_TrainLoRA"))
        assert any(value.abs().max() > 0 for key, value in lora.items() if ".lora_B." in key)
