"""Regularisation images from a second Load Dataset: prior anchors, and DreamBooth's class images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from graphs import training
from inprocess import ComfyUI
from loras import give_values

QUICK = {"steps": 2, "warmup": 0, "preview_every": 0, "probe_every": 0, "rollout_steps": 1, "batch_size": 1}


def graph(comfyui: ComfyUI, name: str, text: str = "a lamp", **settings: Any) -> dict[str, Any]:
    whole = training(name, **QUICK, **settings)
    whole["given"] = give_values(comfyui, ("IMAGE", "STRING"), (torch.full((1, 64, 64, 3), 0.4), text))
    inputs = {**whole["data"]["inputs"], "images": ["given", 0], "texts": ["given", 1], "trigger": ""}
    whole["ordinary"] = {"class_type": "DOPSD_LoadDataset", "inputs": inputs}
    whole["conditions"]["inputs"]["regularisation"] = ["ordinary", 0]
    return whole


def test_their_captions_are_prior_anchors(comfyui: ComfyUI) -> None:
    without = comfyui.execute(training("plain", **QUICK))
    run = comfyui.execute(graph(comfyui, "anchored"))
    assert run.status == without.status == "success", run.error
    before, after = (one.value("conditions").data for one in (without, run))
    first, second = ({anchor.features.cpu().numpy().tobytes() for anchor in data.anchors} for data in (before, after))
    assert len(second) == len(first) + 1 and len(after.regularisation) == 1
    assert run.texts("conditions")[-1].splitlines()[0].endswith(", 1 regularisation images")
    assert "of the 1 regularisation images only the captions are used" in run.texts("train")[-1]


def test_dreambooth_trains_on_the_images_and_draws_none(comfyui: ComfyUI) -> None:
    run = comfyui.execute(graph(comfyui, "classes", objective="dreambooth"))
    assert run.status == "success", run.error
    assert not any("draws class images" in text for text in run.texts("train"))
    assert "the 1 regularisation images are the class images: none are drawn" in run.texts("train")[-1]
    log = (Path(run.value("train", 2)) / "train.jsonl").read_text(encoding="utf-8")
    assert log.count('"prior_loss"') == 2


def test_what_their_load_dataset_says_of_a_concept_does_not_count(comfyui: ComfyUI) -> None:
    whole = graph(comfyui, "settings")
    whole["ordinary"]["inputs"] |= {"trigger": "ohwx", "caption_dropout": 0.5, "resolutions": "48, 64"}
    run = comfyui.execute(whole)
    assert run.status == "success", run.error
    assert "the concept is learned for its ordinary words" in run.value("ordinary", 1)
    shown = run.texts("conditions")[-1]
    assert "regularisation: ordinary captions need no trigger: leave ohwx out of its Load Dataset" in shown
    assert "regularisation: caption_dropout 0.5 of its Load Dataset is not used" in shown
    assert "regularisation: its resolutions have no shares: each image has the largest that it reaches" in shown
    assert not [note for note in run.value("conditions").notes if "is learned for its ordinary words" in note]


def test_a_caption_that_names_the_concept_is_named(comfyui: ComfyUI) -> None:
    whole = graph(comfyui, "bad", "a [V] badge on a shelf")
    del whole["train"]
    inputs = {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2]}
    whole["show"] = {"class_type": "DOPSD_TeacherPreview", "inputs": {**inputs, "seed": 0, "steps": 1, "pictures": 1}}
    run = comfyui.execute(whole)
    assert run.status == "success", run.error
    assert "regularisation image image_0001.png: its caption names the concept" in run.texts("conditions")[-1]
    assert "regularisation image image_0001.png" in run.texts("show")[-1]
