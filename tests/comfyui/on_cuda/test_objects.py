"""MODEL, CLIP and VAE after our nodes: used in stock ways, they give what they gave before, to the bit.

Each comes from its stock loader and goes through a shipped workflow up to the conditions, Teacher Preview or training.
On a device each of these moves weights, and weights that are moved outside of inference mode are lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import stock_files
import torch
from bases import unload
from graphs import node_of, shipped, shrunk
from inprocess import ComfyUI
from loras import give_values, random_lora
from runs import Run
from torch import Tensor, nn

CASES = [
    ("z_image_turbo_train", "DOPSD_BuildTeacherCondition"),
    pytest.param("z_image_turbo_train", "DOPSD_TeacherPreview", marks=pytest.mark.central),
    ("klein_train", "DOPSD_TeacherPreview"),
    pytest.param("klein_edit_train", "DOPSD_TrainLoRA", marks=pytest.mark.central),
]
"""A workflow, and its last node."""
SETTINGS = {"steps": 2, "rollout_steps": 2, "probe_every": 2, "preview_every": 0}


@pytest.fixture(scope="module")
def trains(comfyui: ComfyUI, stock: Callable[..., None]) -> Callable[[str], dict]:
    """trains(name): the graph of that workflow on small files, with Teacher Preview."""
    stock()
    for folder, write in (("my_concept", stock_files.write_concept), ("my_edit", stock_files.write_edits)):
        shutil.rmtree(comfyui.input / folder, ignore_errors=True)
        write(comfyui.input / folder)
    shutil.copy(comfyui.input / "my_concept" / "snow.png", comfyui.input / "example.png")
    return lambda name: shrunk(shipped(name), **SETTINGS, run_name=f"objects-{name}")


LOADERS = {"model": "UNETLoader", "clip": "CLIPLoader", "vae": "VAELoader"}
SOCKETS = ("MODEL", "CLIP", "VAE")


def loaded(comfyui: ComfyUI, graph: dict) -> dict[str, Any]:
    """MODEL, CLIP and VAE from the graph's stock loaders."""
    nodes = {name: node_of(graph, kind) for name, kind in LOADERS.items()}
    alone = {node: graph[node] for node in nodes.values()}
    shown = {f"show_{node}": {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}} for node in alone}
    run = comfyui.execute({**alone, **shown})
    assert run.status == "success", run.error
    return {name: run.value(node) for name, node in nodes.items()}


def given(comfyui: ComfyUI, graph: dict, objects: dict[str, Any]) -> dict:
    """The graph with these objects in place of its loaders."""
    ids = {node["class_type"]: key for key, node in graph.items()}
    slots = {ids[kind]: slot for slot, kind in enumerate(LOADERS.values()) if kind in ids}

    def link(value: Any) -> Any:
        return ["given", slots[value[0]]] if isinstance(value, list) and value[0] in slots else value

    nodes = {
        key: {**node, "inputs": {name: link(value) for name, value in node["inputs"].items()}}
        for key, node in graph.items()
        if key not in slots
    }
    return {"given": give_values(comfyui, SOCKETS, list(objects.values())), **nodes}


def up_to(graph: dict, last: str) -> dict:
    """The graph up to its node of that class, which is shown."""
    kept, waiting = {}, [node_of(graph, last)]
    while waiting:
        node = waiting.pop()
        kept[node] = graph[node]
        waiting += [value[0] for value in graph[node]["inputs"].values() if isinstance(value, list)]
    return {**kept, "shown": {"class_type": "PreviewAny", "inputs": {"source": [node_of(graph, last), 0]}}}


def used(comfyui: ComfyUI, objects: dict[str, Any]) -> dict[str, Tensor]:
    """What stock nodes make of them: text, a sample, a sample with a LoRA, its decoding, and that encoded."""
    lora = random_lora(comfyui, objects["model"], 0.5, 4, 0)
    channels = objects["vae"].latent_channels
    latent = {"samples": torch.zeros(1, channels, *((4, 4) if channels == 128 else (8, 8)))}
    sampler = {
        "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["given", 4],
    }  # fmt: skip
    graph = {
        "given": give_values(comfyui, (*SOCKETS, "LORA_MODEL", "LATENT"), [*objects.values(), lora, latent]),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["given", 1], "text": "a badge"}},
        "sample": {"class_type": "KSampler", "inputs": {"model": ["given", 0], **sampler}},
        "lora": {
            "class_type": "LoraModelLoader",
            "inputs": {"model": ["given", 0], "lora": ["given", 3], "strength_model": 1.0, "bypass": False},
        },
        "with_lora": {"class_type": "KSampler", "inputs": {"model": ["lora", 0], **sampler}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["given", 2]}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["decode", 0], "vae": ["given", 2]}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["encode", 0]}},
        "show_lora": {"class_type": "PreviewAny", "inputs": {"source": ["with_lora", 0]}},
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    return {
        "text": run.value("text")[0][0],
        "decode": run.value("decode"),
        **{name: run.value(name)["samples"] for name in ("sample", "with_lora", "encode")},
    }


def state(objects: dict[str, Any]) -> dict[str, list[tuple[bool, bool]]]:
    """Of every parameter whether it is an inference tensor, and whether views of it can be taken in inference mode."""
    networks: dict[str, nn.Module] = {
        "model": objects["model"].model,
        "clip": objects["clip"].cond_stage_model,
        "vae": objects["vae"].first_stage_model,
    }
    return {
        name: [(p.is_inference(), is_usable(p)) for p in network.parameters()] for name, network in networks.items()
    }


def is_usable(parameter: nn.Parameter) -> bool:
    with torch.inference_mode():
        try:
            parameter.view(parameter.shape)
        except RuntimeError:
            return False
    return True


@pytest.mark.parametrize(("name", "last"), CASES)
def test_they_are_what_they_were(comfyui: ComfyUI, trains: Callable[[str], dict], name: str, last: str) -> None:
    """Fresh from their files, so that our nodes are the first that bring them to the device."""
    graph = trains(name)
    others = loaded(comfyui, graph)
    wanted, wanted_state = used(comfyui, others), state(others)
    assert not torch.equal(wanted["sample"], wanted["with_lora"])

    unload(comfyui)
    for entry in comfyui.module("nodes.comfy_host.paths").condition_cache().glob("*"):
        entry.unlink()
    objects = loaded(comfyui, graph)
    run: Run = comfyui.execute(given(comfyui, up_to(graph, last), objects))
    assert run.status == "success", run.error
    assert state(objects) == wanted_state
    got = used(comfyui, objects)
    assert {key: torch.equal(got[key], wanted[key]) for key in wanted} == dict.fromkeys(wanted, True)
    assert state(objects) == wanted_state
