"""Ten optimizer steps of our nodes inside ComfyUI on Krea 2 against a plain restatement of the authors' step, in
diffusers, transformers and peft. The teacher sees the image through the text encoder's own vision tower.

The authors do not train this model: its grid is the one of diffusers' pipeline for the distilled checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import authors
import krea2_twins
import numpy
import pytest
import torch
import twins
from inprocess import ComfyUI
from PIL import Image
from torch import Tensor

K, BLOCKS = 4, 2

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def models(comfyui: ComfyUI) -> dict[str, Any]:
    """MODEL, CLIP and VAE as loader nodes leave them, and diffusers' pipeline with their weights."""
    return comfyui.call(make_models)


def make_models() -> dict[str, Any]:
    model = krea2_twins.model(BLOCKS)
    with torch.inference_mode():  # so that some gradients are clipped and some are not
        model.model.diffusion_model.last.linear.weight.mul_(2.4)
    clip, encoder = krea2_twins.clips()
    vae, their_vae = krea2_twins.vaes()
    network = krea2_twins.diffusers_krea2(model)
    pipe = krea2_twins.pipeline(network, their_vae, encoder, krea2_twins.tokenizer(clip))
    return {"model": model, "clip": clip, "vae": vae, "pipe": pipe}


def image_of(path: Path) -> Tensor:
    """[3, H, W] in [0, 1]."""
    pixels = numpy.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def distilled_grid(pipe: Any) -> tuple[float, ...]:
    """The sigmas of Krea2Pipeline for the distilled checkpoint with K steps."""
    pipe.scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / K, K), mu=1.15)
    return tuple(pipe.scheduler.sigmas.tolist())


@pytest.fixture(scope="module")
def features(comfyui: ComfyUI, models: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) features [L, D] of every image, in the order of the files."""
    pipe, files = models["pipe"], authors.write_images(comfyui.input / "krea2_step")
    return [
        (
            krea2_twins.text_features(pipe, caption),
            krea2_twins.seen_features(pipe.text_encoder, models["clip"], caption, image_of(file)),
        )
        for file, caption in zip(files, authors.captions(), strict=True)
    ]


@pytest.fixture(scope="module")
def trained(comfyui: ComfyUI, models: dict[str, Any], features: Any) -> tuple[Any, authors.Trained, authors.Trained]:
    """(our training set, ours, theirs)."""
    data, ours = authors.our_training(comfyui, models, "krea2_step", mode="vlm")
    pipe = models["pipe"]

    def seeing(text: Tensor) -> authors.Velocity:
        return lambda x, sigma: krea2_twins.velocity(pipe.transformer, x, sigma, [text])

    grid = distilled_grid(pipe)
    pairs = [authors.Pair(seeing(student), seeing(teacher), grid) for student, teacher in features]
    return data, ours, authors.their_training(comfyui, models["model"], pipe.transformer, pairs, data)


def test_conditions(trained: Any, features: list[tuple[Tensor, Tensor]]) -> None:
    """The teacher differs from the student by more than these tolerances allow."""
    pairs = trained[0].pairs
    assert len(pairs) == len(features) == len(authors.IMAGES)
    for pair, (student, teacher) in zip(pairs, features, strict=True):
        assert twins.relative(pair.student.features, student) < 1e-4
        assert twins.relative(pair.teacher.features, teacher) < 1e-4
        assert len(pair.teacher.features) > len(pair.student.features) + 200


def test_losses_and_gradient_norms_of_every_step(trained: Any) -> None:
    _, ours, theirs = trained
    authors.assert_same_curves(ours, theirs)
    assert min(theirs.norms) < 1 < max(theirs.norms)  # some steps are clipped, some are not


def test_weights_after_ten_steps(trained: Any) -> None:
    _, ours, theirs = trained
    authors.assert_same_weights(ours, theirs, parts=8 * BLOCKS)
