"""Our nodes inside ComfyUI against the authors' step for FLUX.2-klein, in diffusers, transformers and peft.

Ten optimizer steps with the editing branch as teacher, and a few of an edit LoRA.

Not inherited from their scripts are the targets, which leave out the single-stream blocks and the MLPs, and the grid:
both sides here have all targets, and the grid that the model is sampled on, by diffusers' own scheduler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import authors
import klein_twins
import numpy
import pytest
import torch
import twins
from inprocess import ComfyUI
from PIL import Image
from torch import Tensor

K = 4
DOUBLE, SINGLE = 2, 2
SENTENCE = "Keep to the reference image."
EDITS_STEPS, EDITS_SENTENCE = 4, "The last reference image is what is wanted."

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def models(comfyui: ComfyUI) -> dict[str, Any]:
    """MODEL, CLIP and VAE as loader nodes leave them, and diffusers' pipeline with their weights."""
    return comfyui.call(make_models)


def make_models() -> dict[str, Any]:
    model = klein_twins.model(3 * klein_twins.TEXT["hidden_size"], DOUBLE, SINGLE)
    with torch.inference_mode():  # large enough for some gradients to be clipped
        model.model.diffusion_model.final_layer.linear.weight.mul_(3)
    clip, encoder, tokenizer = klein_twins.clips()
    vae, their_vae = klein_twins.vaes()
    pipe = klein_twins.pipeline(klein_twins.diffusers_klein(model), their_vae, encoder, tokenizer)
    return {"model": model, "clip": clip, "vae": vae, "pipe": pipe}


def their_text(pipe: Any, text: str) -> Tensor:
    """Features [512, D]."""
    with torch.no_grad():
        return pipe.encode_prompt(text)[0][0]


def their_latent(pipe: Any, image: Path) -> Tensor:
    """[128, h, w] of an image."""
    pixels = torch.from_numpy(numpy.asarray(Image.open(image).convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    generator: Any = None
    with torch.no_grad():
        return pipe._encode_vae_image(pixels[None] * 2 - 1, generator)[0]


def inference_grid(pipe: Any, width: int, height: int) -> tuple[float, ...]:
    """The sigmas of Flux2KleinPipeline with K steps."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(width * height // 256, K)
    pipe.scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / K, K), mu=mu)
    return tuple(pipe.scheduler.sigmas.tolist())


def velocity_with(pipe: Any, text: Tensor, *references: Tensor) -> authors.Velocity:
    return lambda x, sigma: klein_twins.velocity(pipe.transformer, x, sigma, [text], [references])


# -- edit: the teacher has the target as reference ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(comfyui: ComfyUI, models: dict[str, Any]) -> tuple[Any, authors.Trained, authors.Trained]:
    """(our training set, ours, theirs)."""
    pipe, images = models["pipe"], authors.write_images(comfyui.input / "klein_step")
    data, ours = authors.our_training(comfyui, models, "klein_step", mode="edit", teacher_sentence=SENTENCE)
    pairs = []
    for image, caption, size in zip(images, authors.captions(), authors.IMAGES, strict=True):
        student = velocity_with(pipe, their_text(pipe, caption))
        teacher = velocity_with(pipe, their_text(pipe, f"{caption} {SENTENCE}"), their_latent(pipe, image))
        pairs.append(authors.Pair(student, teacher, inference_grid(pipe, *size)))
    return data, ours, authors.their_training(comfyui, models["model"], pipe.transformer, pairs, data)


def test_losses_and_gradient_norms_of_every_step(trained: Any) -> None:
    _, ours, theirs = trained
    authors.assert_same_curves(ours, theirs)
    assert min(theirs.norms) < 1 < max(theirs.norms)  # some steps are clipped, some are not


def test_weights_after_ten_steps(trained: Any) -> None:
    _, ours, theirs = trained
    authors.assert_same_weights(ours, theirs, parts=12 * DOUBLE + 2 * SINGLE)


# -- edit_target: both have the source, the teacher the target too -----------------------------------------------------


@pytest.fixture(scope="module")
def edits(comfyui: ComfyUI, models: dict[str, Any]) -> tuple[Any, authors.Trained, authors.Trained]:
    pipe, folder = models["pipe"], comfyui.input / "klein_edit_step"
    targets = authors.write_images(folder / "target")
    sources = authors.write_images(folder / "source", seed=5)
    for text in (folder / "source").glob("*.txt"):
        text.unlink()
    data, ours = authors.our_training(
        comfyui, models, folder.name, EDITS_STEPS, mode="edit_target", teacher_sentence=EDITS_SENTENCE
    )
    pairs = []
    for source, target, caption, size in zip(sources, targets, authors.captions(), authors.IMAGES, strict=True):
        before, after = their_latent(pipe, source), their_latent(pipe, target)
        student = velocity_with(pipe, their_text(pipe, caption), before)
        teacher = velocity_with(pipe, their_text(pipe, f"{caption} {EDITS_SENTENCE}"), before, after)
        pairs.append(authors.Pair(student, teacher, inference_grid(pipe, *size)))
    return data, ours, authors.their_training(comfyui, models["model"], pipe.transformer, pairs, data, EDITS_STEPS)


def test_losses_and_gradient_norms_of_an_edit(edits: Any) -> None:
    _, ours, theirs = edits
    authors.assert_same_curves(ours, theirs)


def test_weights_of_an_edit_lora(edits: Any) -> None:
    _, ours, theirs = edits
    authors.assert_same_weights(ours, theirs, parts=12 * DOUBLE + 2 * SINGLE)


@pytest.mark.parametrize("kind", ["trained", "edits"])
def test_the_references_and_the_sentence_are_seen(kind: str, request: pytest.FixtureRequest) -> None:
    """What the equalities above are about: student and teacher differ by more than those allow."""
    data, _, theirs = request.getfixturevalue(kind)
    assert min(theirs.losses) > 0 and min(theirs.norms) > 0
    for pair in data.pairs:
        assert len(pair.teacher.reference_latents) == len(pair.student.reference_latents) + 1
        assert twins.relative(pair.teacher.features, pair.student.features) > 0.01
