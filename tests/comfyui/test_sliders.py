"""A slider in ComfyUI: a teacher that reads other words and sees no image, and a preset that does not fit the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import training
from inprocess import ComfyUI
from PIL import Image

FOLDER = "plain_images"


@pytest.fixture(scope="module")
def folder(comfyui: ComfyUI) -> Iterator[None]:
    """Two images with plain captions."""
    place = comfyui.input / FOLDER
    place.mkdir()
    for name, colour in (("top", "red"), ("left", "blue")):
        Image.new("RGB", (64, 64), colour).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"a badge, {name}, on a sand background", encoding="utf-8")
    yield
    shutil.rmtree(place)


def slider(name: str, sentence: str, **train: Any) -> dict[str, Any]:
    """A run of two steps without a vision tower; the first preview prompt lacks the word, the second has it."""
    graph = training(name, steps=2, warmup=0, probe_every=1, preview_every=2, **train)
    graph["data"]["inputs"] |= {"folder": FOLDER, "trigger": ""}
    prompts = "a house\na badge, bottom, on a navy background"
    graph["conditions"]["inputs"]["anchor_prompts"] = "a sky\na red badge"
    graph["conditions"]["inputs"] |= {"mode": "words", "teacher_sentence": sentence, "preview_prompts": prompts}
    del graph["conditions"]["inputs"]["vision"]
    return graph


def test_a_slider_trains_without_a_vision_tower_and_measures_a_prompt_with_the_word(
    comfyui: ComfyUI, folder: None
) -> None:
    run = comfyui.execute(slider("slider", "badge -> striped badge"))
    assert run.status == "success", run.error
    conditions = run.value("conditions")
    assert [pair.caption for pair in conditions.data.pairs] == [
        "a badge, left, on a sand background",
        "a badge, top, on a sand background",
    ]
    assert conditions.data.heldout.caption == "a badge, bottom, on a navy background"
    house, badge = conditions.previews
    assert torch.equal(house.student.features, house.teacher.features)
    assert badge.student.features.shape != badge.teacher.features.shape
    said = run.texts("conditions")[-1]
    assert "1 of 2 prompts do not contain 'badge'" in said and "1 anchor prompt contains 'badge'" in said
    assert run.value("train").facts["dopsd_teacher_sentence"] == "badge -> striped badge"


def test_a_slider_without_words_is_refused(comfyui: ComfyUI, folder: None) -> None:
    refused = comfyui.execute(slider("none", ""))
    assert "sees no image: write in teacher_sentence what it reads" in refused.error
    refused = comfyui.execute(slider("absent", "face -> smiling face"))
    assert "does not contain 'face'" in refused.error


def test_a_slider_whose_words_the_objective_ignores_is_refused(comfyui: ComfyUI, folder: None) -> None:
    refused = comfyui.execute(slider("sft slider", "badge -> red badge", objective="sft"))
    assert "objective sft trains on the images, which ignores its words" in refused.error
    refused = comfyui.execute(slider("arrow", "badge → red badge"))
    assert "has the arrow →: write one ->" in refused.error


@pytest.mark.long
def test_a_preset_that_does_not_fit_the_dataset_is_noted(comfyui: ComfyUI, folder: None) -> None:
    run = comfyui.execute(slider("edit preset", "badge -> red badge", preset="edit", rank=2, batch_size=1))
    assert run.status == "success", run.error
    lines = run.texts("train")[-1].splitlines()
    assert sum("the preset edit is for pairs of source and target" in line for line in lines) == 1
