"""Several concepts and several resolutions in one run, through the nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graphs import training
from inprocess import ComfyUI
from PIL import Image
from runs import Run
from safetensors import safe_open
from test_saved_loras import saving

FOLDER = "pets"
PROMPTS = {"preview_prompts": "an ohwx dog in snow", "anchor_prompts": "a tree"}


@pytest.fixture(scope="module")
def folder(comfyui: ComfyUI) -> Iterator[Path]:
    """input/pets: a dog and a cat, each with its trigger; one image is too small for 64 pixels."""
    folder = comfyui.input / FOLDER
    for shade, (kind, trigger) in enumerate((("dog", "ohwx"), ("cat", "sks"))):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "trigger.txt").write_text(trigger + "\n", encoding="utf-8")
        for number, side in enumerate((64, 64 if kind == "dog" else 48)):
            gradient = Image.linear_gradient("L").resize((side, side))
            Image.merge(
                "RGB", [gradient, Image.new("L", gradient.size, 90 * shade), gradient.rotate(90 * number)]
            ).save(folder / kind / f"{number}.png")
            (folder / kind / f"{number}.txt").write_text(f"a [V] {kind}, {number}", encoding="utf-8")
    yield folder


def graph(name: str, data: dict[str, Any] | None = None, prompts: dict[str, str] | None = None, **train: Any) -> dict:
    nodes = training(name, **{"steps": 2, "preview_every": 2, "probe_every": 1, "warmup": 0, **train})
    nodes["data"]["inputs"].update({"folder": FOLDER, "trigger": "", **(data or {})})
    nodes["conditions"]["inputs"].update(prompts or PROMPTS)
    return nodes


@pytest.fixture(scope="module")
def trained(comfyui: ComfyUI, folder: Path) -> Run:
    run = comfyui.execute(graph("several", {"resolutions": "48, 64:3"}))
    assert run.status == "success", run.error
    return run


@pytest.mark.long
def test_an_image_counts_whichever_resolution_it_reaches(comfyui: ComfyUI) -> None:
    folder = comfyui.input / "sizes"
    for shade, (kind, trigger, side) in enumerate((("dog", "ohwx", 96), ("cat", "sks", 64))):
        for number in range(2):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side), (90 * shade, 60 * number, 30)).save(folder / kind / f"{number}.png")
            (folder / kind / f"{number}.txt").write_text(f"a [V] badge, {number}", encoding="utf-8")
        (folder / kind / "trigger.txt").write_text(trigger, encoding="utf-8")
    data = {"folder": "sizes", "resolutions": "64, 96"}
    refused = comfyui.execute(graph("sizes", data, {"preview_prompts": "a [V] badge"}))
    assert refused.status == "error" and "preview prompt 1: [V] may stand for any of ohwx, sks" in refused.error
    whole = saving(comfyui, "sizes", small_first=6, keep_loras=3, save_every=0)
    whole["data"]["inputs"] |= {"trigger": "", **data}
    whole["conditions"]["inputs"]["preview_prompts"] = "a sks badge, 0\na sks badge at night"
    inputs = {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2]}
    whole["show"] = {"class_type": "DOPSD_TeacherPreview", "inputs": {**inputs, "seed": 0, "steps": 1, "pictures": 4}}
    run = comfyui.execute(whole)
    assert run.status == "success", run.error
    heldout = run.value("conditions").data.heldout
    assert heldout.caption == "a sks badge at night" and tuple(heldout.target_latent.shape[1:]) == (8, 8)
    assert "2 in bucket 64x64" in run.value("data", 1) and "2 in bucket 96x96" in run.value("data", 1)
    assert "upsampled" not in run.value("data", 1)
    notes = run.texts("train")[-1]
    assert notes.count("small_first (6) leaves none of the 6 steps for the largest resolution") == 1
    assert notes.count("keep_loras 3 is not used: save_every is 0") == 1


def test_each_concept_is_reported(trained: Run) -> None:
    assert "2 of the concept ohwx" in trained.value("data", 1) and "2 of the concept sks" in trained.value("data", 1)
    assert "2 concepts: sks, ohwx" in trained.texts("conditions")[-1]
    assert any("by concept: sks " in text and ", ohwx " in text for text in trained.texts("train"))
    report = json.loads((Path(trained.value("train", 2)) / "report.json").read_text())
    assert report["relative_gap_by_concept"].keys() == {"ohwx", "sks"} and report["trigger"] == "sks, ohwx"
    with safe_open(Path(trained.value("train", 2)) / "lora.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["dopsd_trigger"] == "sks, ohwx" and json.loads(facts["dopsd_concepts"]) == ["sks", "ohwx"]


def test_each_resolution_is_encoded(trained: Run) -> None:
    data = trained.value("conditions").data
    assert [shape[-1] for shape in data.shapes()] == [8, 8, 8, 6, 6, 6, 6]
    assert [scale.share for scale in data.scales] == [3.0, 1.0]
    assert "1 of 4 images are smaller than 64 and not trained at it" in trained.texts("train")[-1]


def test_previews_are_drawn_with_the_concept_that_they_name(comfyui: ComfyUI, folder: Path) -> None:
    previews = comfyui.module("nodes.comfy_host.previews")
    pairs = comfyui.execute({"1": graph("x")["data"]}).value("1").pairs
    index = comfyui.core("training.shown_images").pair_of_prompt(pairs, "an ohwx dog in snow", 0)
    assert pairs[index].trigger == "ohwx" and pairs[0].trigger == "sks"  # the folder cat is read first
    with pytest.raises(ValueError, match="preview prompt 1: .V. may stand for any of sks, ohwx"):
        previews.preview_texts("a [V] in snow", pairs, "")


@pytest.mark.parametrize(
    ("data", "prompts", "sentence"),
    [
        ({}, {**PROMPTS, "anchor_prompts": "a [V] tree"}, "anchor prompt 1: [V] may stand for any of"),
        ({"resolutions": "48, 48"}, PROMPTS, "resolutions: 48 is there twice"),
        ({"resolutions": "512"}, PROMPTS, ""),
        ({"resolutions": "64, 512"}, PROMPTS, "resolutions: no image is as large as 512"),
    ],
)
def test_mistakes_are_one_sentence(
    comfyui: ComfyUI, folder: Path, data: dict[str, Any], prompts: dict[str, str], sentence: str
) -> None:
    nodes = graph("wrong", data, prompts)
    del nodes["train"]
    if data.get("resolutions") == "512":  # one resolution that is too large is a warning of the dataset
        run = comfyui.execute({"1": nodes["data"]})
        assert run.status == "success" and "would be upsampled" in run.value("1", 1)
        return
    nodes["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["conditions", 0]}}
    assert sentence in comfyui.execute(nodes).error


@pytest.mark.long
def test_a_placeholder_in_compare_lora_is_refused(comfyui: ComfyUI, trained: Run, folder: Path) -> None:
    nodes = graph("several", {"resolutions": "48, 64:3"})
    inputs = {"prompts": "a [V] in snow", "strengths": "1", "seed": 0, "steps": 0, "width": 64, "height": 64}
    links = {"model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "lora": ["train", 0]}
    nodes["compare"] = {"class_type": "DOPSD_CompareLoRA", "inputs": {**inputs, **links, "lora_name": "none"}}
    run = comfyui.execute(nodes)
    assert "prompt 1: [V] may stand for any of sks, ohwx: write one of these words" in run.error


def test_small_first_without_several_resolutions_is_reported(comfyui: ComfyUI, folder: Path) -> None:
    nodes = graph("small-first", preview_every=0)
    settings = {"model_family": "Z-Image-Turbo", "preset": "demo model", "small_first": 5}
    nodes["settings"] = {"class_type": "DOPSD_TrainingSettings", "inputs": settings}
    nodes["train"]["inputs"]["settings"] = ["settings", 0]
    run = comfyui.execute(nodes)
    assert run.status == "success", run.error
    assert "small_first 5 is not used: there is only one resolution" in run.texts("train")[-1]
