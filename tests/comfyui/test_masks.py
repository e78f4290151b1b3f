"""Masks in ComfyUI: the teacher is shown the subject alone, and Teacher Preview shows what it sees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import training
from inprocess import ComfyUI
from loras import give_values
from PIL import Image

FOLDER = "masked_images"


@pytest.fixture(scope="module")
def folder(comfyui: ComfyUI) -> Iterator[None]:
    """Two images with masks of their left halves, one without."""
    place = comfyui.input / FOLDER
    place.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (64, 64), colour).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"a [V] badge, {name}", encoding="utf-8")
        if name != "c":
            mask = Image.new("L", (64, 64))
            mask.paste(255, (0, 0, 32, 64))
            mask.save(place / f"{name}.mask.png")
    yield
    shutil.rmtree(place)


def graph(background: str, **data: Any) -> dict[str, Any]:
    """Conditions and Teacher Preview of the folder's images."""
    whole = training("masks")
    del whole["train"]
    whole["data"]["inputs"] |= {"folder": FOLDER, **data}
    whole["conditions"]["inputs"] |= {"teacher_background": background, "preview_prompts": ""}
    inputs = {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2]}
    whole["show"] = {"class_type": "DOPSD_TeacherPreview", "inputs": {**inputs, "seed": 0, "steps": 1, "pictures": 3}}
    return whole


def test_the_teacher_sees_the_subject_alone_and_the_preview_shows_it(comfyui: ComfyUI, folder: None) -> None:
    keep, grey = (comfyui.execute(graph(background)) for background in ("keep", "grey"))
    assert keep.status == grey.status == "success", (keep.error, grey.error)
    before, after = (run.value("conditions").data for run in (keep, grey))
    assert before.fingerprint() != after.fingerprint()
    same = [torch.equal(x.teacher.features, y.teacher.features) for x, y in zip(before.pairs, after.pairs, strict=True)]
    assert same == [False, False, True]  # the third has no mask
    for x, y in zip(before.pairs, after.pairs, strict=True):
        assert torch.equal(x.target_latent, y.target_latent) and torch.equal(x.student.features, y.student.features)
    assert "the masks of 2 images are not used: teacher_background is keep" in keep.texts("conditions")[-1]
    assert "1 of 3 images have no mask: the teacher sees them whole" in grey.texts("show")[-1]
    assert grey.value("show").shape[1] - keep.value("show").shape[1] > 100  # one more row
    grey_pixels = (grey.value("show") - 128 / 255).abs().amax(-1) < 0.02
    assert grey_pixels.sum() > 2 * 32 * 64


def test_connected_images_with_alpha_have_masks(comfyui: ComfyUI) -> None:
    image = torch.ones(1, 64, 64, 4)
    image[..., 32:, 3] = 0
    whole = graph("remove", images=["given", 0], texts=["given", 1])
    whole["given"] = give_values(comfyui, ("IMAGE", "STRING"), (image, "a [V] badge"))
    run = comfyui.execute(whole)
    assert run.status == "success", run.error
    (pair,) = run.value("conditions").pairs
    assert pair.mask == pair.image_path


def test_without_masks_it_is_refused(comfyui: ComfyUI) -> None:
    whole = graph("blur")
    whole["data"]["inputs"]["folder"] = training()["data"]["inputs"]["folder"]
    run = comfyui.execute(whole)
    assert run.status == "error" and "teacher_background blur needs masks, and no image has one" in run.error


def test_a_mask_that_is_replaced_is_read_again(comfyui: ComfyUI, folder: None) -> None:
    first = comfyui.execute(graph("grey"))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 20))
    mask.save(comfyui.input / FOLDER / "a.mask.png")
    second = comfyui.execute(graph("grey"), keep_cache=True)
    assert first.value("conditions").data.fingerprint() != second.value("conditions").data.fingerprint()
