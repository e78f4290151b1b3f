"""Inputs of our nodes that come over links: ComfyUI neither checks such a value nor says beforehand what it is."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import training
from inprocess import ComfyUI
from PIL import Image


@pytest.fixture
def linked(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch):
    """linked(value, is_list=False): a node whose output fits every input."""

    def make(value: Any, is_list: bool = False) -> dict:
        kind = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
            "RETURN_TYPES": ("*",),
            "OUTPUT_IS_LIST": (is_list,),
            "FUNCTION": "give",
            "give": lambda self: (value,),
        }
        monkeypatch.setitem(comfyui.nodes.NODE_CLASS_MAPPINGS, "TestGive", type("TestGive", (), kind))
        return {"class_type": "TestGive", "inputs": {}}

    return make


@pytest.fixture
def folder(comfyui: ComfyUI) -> Path:
    folder = comfyui.input / "linked_folder"
    folder.mkdir(exist_ok=True)
    Image.linear_gradient("L").resize((64, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("a [V] cat")
    return folder


def graph(**inputs: Any) -> dict:
    return {"data": {"class_type": "DOPSD_LoadDataset", "inputs": {"resolution": 64, **inputs}}}


def test_a_dataset_whose_folder_comes_over_a_link_is_read_anew(comfyui: ComfyUI, folder: Path, linked) -> None:
    """ComfyUI keeps a node's output, and a caption may have been corrected since."""
    whole = {"give": linked(folder.name), **graph(folder=["give", 0])}
    for caption in ("a [V] cat", "a [V] dog"):
        (folder / "a.txt").write_text(caption)
        run = comfyui.execute(copy.deepcopy(whole), keep_cache=True)
        assert run.status == "success", run.error
        assert run.value("data").report.pairs[0].captions == (caption,)


def test_conditions_are_encoded_again_after_an_embedding_was_replaced(comfyui: ComfyUI) -> None:
    """A caption may name it, which only the dataset knows."""
    whole = training("embedded")
    del whole["train"]
    whole["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["conditions", 0]}}
    file = comfyui.base / "models" / "embeddings" / "mine.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = []
    for content in (b"one", b"one", b"another"):
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
        run = comfyui.execute(copy.deepcopy(whole), keep_cache=True)
        assert run.status == "success", run.error
        encoded.append(bool(run.of("text", "conditions")))
    file.unlink()
    assert encoded == [True, False, True]


def test_files_whose_names_come_over_a_link_are_never_taken_for_the_same(comfyui: ComfyUI) -> None:
    nodes = {name: node.fingerprint_inputs for name, node in comfyui.pack_nodes.items()}
    assert math.isnan(nodes["DOPSD_LoadDataset"](folder=(None,)))
    assert math.isnan(nodes["DOPSD_CompareLoRA"](lora_name=None))
    compare = nodes["DOPSD_CompareLoRA"]
    assert compare() == compare(lora_name="none") == compare(lora_name=None, lora=None)  # no file is read


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("trigger", ["ohwx", "sks"], "trigger of Load Dataset has 2 values"),
        ("resolution", [64, 128, 64], "resolution of Load Dataset has 3 values"),
        ("repeats", [], "repeats of Load Dataset has no value"),
        ("caption_dropout", [0.0, 0.5], "caption_dropout of Load Dataset has 2 values"),
    ],
)
def test_a_list_where_one_value_belongs(
    comfyui: ComfyUI, folder: Path, linked, name: str, values: list, sentence: str
) -> None:
    """Load Dataset takes lists of images and texts, and gets every other input as a list too."""
    run = comfyui.execute({"give": linked(values, True), **graph(folder=folder.name, **{name: ["give", 0]})})
    assert run.status == "error" and sentence in run.error


def test_a_list_of_equal_values_is_one_value(comfyui: ComfyUI, folder: Path, linked) -> None:
    run = comfyui.execute({"give": linked(["ohwx"] * 3, True), **graph(folder=folder.name, trigger=["give", 0])})
    assert run.status == "success", run.error
    assert run.value("data").report.pairs[0].captions == ("a ohwx cat",)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.full((1, 64, 64, 3), torch.nan), "values from nan to nan"),
        (torch.full((1, 64, 64, 3), 180.0), "values from 180 to 180"),
        (torch.linspace(-1, 1, 64 * 64 * 3).view(1, 64, 64, 3), "values from -1 to 1, they must be within 0 and 1"),
        (torch.zeros(1, 64, 64, 1), r"the shape [1, 64, 64, 1], it must be [n, H, W, 3 or 4]"),
        (torch.zeros(64, 64, 3), r"the shape [64, 64, 3], it must be"),
    ],
)
def test_connected_images_that_are_none(comfyui: ComfyUI, image: torch.Tensor, sentence: str) -> None:
    """An image of NaN, as a VAE gives in too narrow a dtype, would be trained as black."""
    with pytest.raises(ValueError, match="images 2 of those connected to Load Dataset have") as raised:
        comfyui.module("nodes.load_dataset").store_images([torch.rand(1, 64, 64, 3), image], ["a", "b"])
    assert sentence in str(raised.value)


def test_connected_images_may_overshoot_a_little(comfyui: ComfyUI) -> None:
    image = torch.linspace(-0.1, 1.1, 64 * 64 * 3).view(1, 64, 64, 3)
    stored = comfyui.module("nodes.load_dataset").store_images([image], ["a [V] cat"])
    assert [path.suffix for path in sorted(stored.glob("image*"))] == [".png", ".txt"]


@pytest.mark.parametrize(
    ("name", "slot", "kind"),
    [("clip", 0, "ModelPatcher"), ("vae", 1, "CLIP"), ("dataset", 2, "VAE"), ("vision", 1, "CLIP")],
)
def test_a_link_of_another_kind_is_named(comfyui: ComfyUI, name: str, slot: int, kind: str) -> None:
    """A node whose output fits every input, such as a reroute or a switch, gives what it is given."""
    node = comfyui.pack_nodes["DOPSD_BuildTeacherCondition"]
    models = comfyui.call(comfyui.pack_nodes["DOPSD_LoadDemoModels"].execute).result
    checks = comfyui.module("nodes.comfy_host.checked_inputs")
    with pytest.raises(checks.InputError, match=f"{name} is connected to a {kind}"):
        checks.completed(node, {name: models[slot]})
    right = {"clip": models[1], "vae": models[2], "vision": models[3]}
    assert right.items() <= checks.completed(node, right).items()


def test_a_stored_dataset_that_lost_a_file_is_written_again(comfyui: ComfyUI) -> None:
    """Systems clean temporary folders; an image and its caption that are gone would be missing without a word."""
    store = comfyui.module("nodes.load_dataset").store_images
    images, texts = [torch.rand(2, 32, 32, 3)], ["a [V] cat", "a [V] dog"]
    folder = store(images, texts)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("image_0002.png", "image_0002.txt"):
        (folder / name).unlink()
    assert store(images, texts) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
