"""Ten optimizer steps of our nodes inside ComfyUI against the authors' step for Z-Image, in diffusers, transformers and
peft: the text encoder is also Qwen3-VL, whose language weights are swapped for its own, as in their scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import authors
import numpy
import pytest
import stock_files
import torch
import toy
import twins
from inprocess import ComfyUI
from PIL import Image
from torch import Tensor

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_heads": 2,
    "num_position_embeddings": 36, "out_hidden_size": TEXT["hidden_size"],
}  # fmt: skip


# -- what both sides start from ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(comfyui: ComfyUI) -> Iterator[dict[str, Any]]:
    """MODEL, CLIP, VAE and VISION as loader nodes leave them, and the networks of the other libraries.

    The VAE is the demo's, which our nodes would refuse beside another CLIP.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfyui.module("nodes.comfy_host.encoder"), "require_training_vae", lambda *_: None)
        yield comfyui.call(make_models, comfyui)


def make_models(comfyui: ComfyUI) -> dict[str, Any]:
    import comfy.ops
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import z_image

    vision = comfyui.module("nodes.comfy_host.vision")
    transformer = twins.diffusers_z_image(text_width=TEXT["hidden_size"])
    with torch.inference_mode(), toy.allocated():
        target = ClipTarget(z_image.ZImageTokenizer, z_image.te())
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "qwen3_4b_model_config": TEXT})
        toy.fill(clip.cond_stage_model, seed=1)
    real = vision.qwen3vl_4b()
    config = type(real.lm_config)(**TEXT)
    spec = vision.VisionSpec("tiny", {**real.tower, **VISION}, config, real.min_pixels, real.max_pixels)
    encoder, reader = transformers_twins(clip.cond_stage_model.qwen3_4b.transformer.model.state_dict(), spec)
    with torch.inference_mode():
        tower = vision.new_vision(reader.visual.state_dict(), spec, comfy.ops.manual_cast, torch.float32)
        vae = comfy.sd.VAE(sd=stock_files.autoencoder(16), dtype=torch.float32)
    return {
        "model": twins.as_model(transformer), "clip": clip, "vae": vae, "vision": tower,
        "transformer": transformer, "encoder": encoder, "reader": reader,
    }  # fmt: skip


def transformers_twins(language: dict[str, Tensor], spec: Any) -> tuple[Any, Any]:
    """transformers' Qwen3, and its Qwen3-VL, whose own language weights are exchanged for those of Qwen3."""
    from transformers import Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel

    shape: dict[str, Any] = {**TEXT, "vocab_size": 151936, "head_dim": 128}
    encoder = Qwen3Model(Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    encoder.load_state_dict(language)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    reader = Qwen3VLModel(Qwen3VLConfig(text_config={**shape, "rope_parameters": rope}, vision_config=dict(spec.tower)))
    toy.fill(reader.visual, seed=2)
    reader.language_model.load_state_dict(encoder.state_dict())
    return encoder.eval().requires_grad_(False), reader.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(comfyui: ComfyUI) -> list[Path]:
    """None has a size that Qwen3-VL would look at as it is."""
    return authors.write_images(comfyui.input / "authors")


@pytest.fixture(scope="module")
def features(models: dict[str, Any], images: list[Path]) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) features [L, D] of every image, in the order of the files."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    tokenizer = models["clip"].tokenizer.qwen3_4b.tokenizer
    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=512 * 512, max_pixels=768 * 768
    )
    found = []
    for path, caption in zip(images, authors.captions(), strict=True):
        text = tokenizer(f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        pixels = numpy.asarray(Image.open(path).convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        seen = processor(images=image, do_rescale=False, do_convert_rgb=False, return_tensors="pt")
        marks = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
        whole = tokenizer(
            f"<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>{caption}<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        )
        ids = whole["input_ids"]
        with torch.no_grad():
            student = models["encoder"](**text, output_hidden_states=True).hidden_states[-2][0]
            teacher = models["reader"](
                **whole, **seen, mm_token_type_ids=(ids == 151655).long(), output_hidden_states=True
            ).hidden_states[-2][0, :1024]
        found.append((student, teacher))
    return found


@pytest.fixture(scope="module")
def trained(comfyui: ComfyUI, models: dict[str, Any], features: Any) -> tuple[Any, authors.Trained, authors.Trained]:
    """(our training set, ours, theirs)."""
    data, ours = authors.our_training(comfyui, models, "authors", mode="vlm")
    transformer = models["transformer"]

    def velocity_with(text: Tensor) -> authors.Velocity:
        return lambda x, sigma: twins.velocity(transformer, x, sigma, [text])

    pairs = [authors.Pair(velocity_with(student), velocity_with(teacher), SIGMAS) for student, teacher in features]
    return data, ours, authors.their_training(comfyui, models["model"], transformer, pairs, data)


def test_conditions(trained: Any, features: list[tuple[Tensor, Tensor]]) -> None:
    pairs = trained[0].pairs
    assert len(pairs) == len(features) == len(authors.IMAGES)
    for pair, (student, teacher) in zip(pairs, features, strict=True):
        assert twins.relative(pair.student.features, student) < 1e-3
        assert twins.relative(pair.teacher.features, teacher) < 1e-3


def test_losses_and_gradient_norms_of_every_step(trained: Any) -> None:
    _, ours, theirs = trained
    authors.assert_same_curves(ours, theirs)
    assert min(theirs.norms) < 1 < max(theirs.norms)  # some steps are clipped, some are not


def test_weights_after_ten_steps(trained: Any) -> None:
    _, ours, theirs = trained
    authors.assert_same_weights(ours, theirs, parts=7 * 4)
