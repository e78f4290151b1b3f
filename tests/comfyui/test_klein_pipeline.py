"""FLUX.2-klein in ComfyUI's graph, drawn by Few-Step Sampler, against Flux2KleinPipeline of diffusers: text encoder,
VAE, references and network have the same weights, so the images are the same."""

from __future__ import annotations

from typing import Any

import klein_twins
import numpy
import pytest
import torch
import twins
from inprocess import ComfyUI
from loras import give_values
from PIL import Image
from torch import Tensor

PROMPT, SEED, WIDTH, HEIGHT = "a badge in the style of [V], top", 5, 112, 80
SOURCES = [(96, 64), (64, 112)]  # (width, height)


@pytest.fixture(scope="module")
def ours(comfyui: ComfyUI) -> dict[str, Any]:
    return comfyui.call(make_models)


def make_models() -> dict[str, Any]:
    model = klein_twins.model(text_width=3 * klein_twins.TEXT["hidden_size"])
    vae, their_vae = klein_twins.vaes()
    clip, encoder, tokenizer = klein_twins.clips()
    pipe = klein_twins.pipeline(klein_twins.diffusers_klein(model), their_vae, encoder, tokenizer)
    return {"model": model, "clip": clip, "vae": vae, "pipe": pipe}


@pytest.fixture(scope="module")
def sources() -> list[Image.Image]:
    generator = numpy.random.default_rng(6)
    coarse = [generator.integers(0, 256, (h // 8, w // 8, 3), dtype=numpy.uint8) for w, h in SOURCES]
    return [Image.fromarray(p).resize(size) for p, size in zip(coarse, SOURCES, strict=True)]


def as_image(image: Image.Image) -> Tensor:
    """IMAGE [1, H, W, 3]."""
    return torch.from_numpy(numpy.asarray(image).copy()).float()[None] / 255


@pytest.mark.parametrize("name", ["qwen3_4b", "qwen3_8b"])
def test_texts(comfyui: ComfyUI, ours: dict[str, Any], name: str) -> None:
    """All 512 positions, padding included; through the encoder of Build Teacher Condition."""
    clip, pipe = ours["clip"], ours["pipe"]
    if name == "qwen3_8b":
        clip, encoder, tokenizer = comfyui.call(klein_twins.clips, 1, name)
        pipe = klein_twins.pipeline(ours["pipe"].transformer, ours["pipe"].vae, encoder, tokenizer)
    host = comfyui.module("nodes.comfy_host.encoder").ComfyEncoder(clip, ours["vae"], None)
    for text in (PROMPT, "", "[V] " * 90):
        got = comfyui.call(in_inference_mode, host.encode_text, text).features
        with torch.no_grad():
            wanted, _ = pipe.encode_prompt(text)
        assert got.shape == (512, 96)
        assert twins.relative(got, wanted[0]) < 1e-5


def test_latents_of_images(comfyui: ComfyUI, ours: dict[str, Any], sources: list[Image.Image]) -> None:
    """The encoder of Build Teacher Condition, in the space that the network works in."""
    encoder = comfyui.module("nodes.comfy_host.encoder").ComfyEncoder(ours["clip"], ours["vae"], None)
    generator: Any = None
    for image in sources:
        pixels = as_image(image)
        got = comfyui.call(in_inference_mode, encoder.encode_latent, pixels[0].movedim(-1, 0))
        with torch.no_grad():
            wanted = ours["pipe"]._encode_vae_image(pixels.movedim(-1, 1) * 2 - 1, generator)[0]
        assert got.shape == (128, image.height // 16, image.width // 16) and wanted.std() > 0.1
        assert twins.relative(got, wanted) < 1e-4


def in_inference_mode(function: Any, *args: Any) -> Any:
    with torch.inference_mode():
        return function(*args)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["text to image", "edit", "two references"])
def test_images(comfyui: ComfyUI, ours: dict[str, Any], sources: list[Image.Image], number: int) -> None:
    kinds = ("MODEL", "CLIP", "VAE", *("IMAGE" for _ in sources))
    values = [ours["model"], ours["clip"], ours["vae"], *map(as_image, sources)]
    graph: dict[str, Any] = {
        "given": give_values(comfyui, kinds, values),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["given", 1], "text": PROMPT}},
    }
    said = ["text", 0]
    for i in range(number):
        encode = {"pixels": ["given", 3 + i], "vae": ["given", 2]}
        graph[f"latent{i}"] = {"class_type": "VAEEncode", "inputs": encode}
        reference = {"conditioning": said, "latent": [f"latent{i}", 0]}
        graph[f"reference{i}"] = {"class_type": "ReferenceLatent", "inputs": reference}
        said = [f"reference{i}", 0]
    graph["sample"] = {
        "class_type": "DOPSD_FewStepSampler",
        "inputs": {
            "model": ["given", 0], "positive": said, "seed": SEED, "steps": 0, "width": WIDTH, "height": HEIGHT,
            "batch_size": 1, "sampler": "euler",
        },
    }  # fmt: skip
    graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["given", 2]}}
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["decode", 0]}}
    run = comfyui.execute(graph)
    assert run.status == "success", run.error

    noise = torch.randn(1, 128, HEIGHT // 16, WIDTH // 16, generator=torch.manual_seed(SEED))
    wanted: dict[str, Tensor] = {}
    for kind in ("latent", "pt"):
        drawn = ours["pipe"](
            image=sources[:number] or None, prompt=PROMPT, latents=noise.clone(), width=WIDTH, height=HEIGHT,
            num_inference_steps=4, guidance_scale=1.0, output_type=kind,
        ).images  # fmt: skip
        wanted[kind] = drawn
    latents = klein_twins.in_model_space(ours["pipe"], wanted["latent"])
    assert latents.std() > 0.1 and wanted["pt"].std() > 0.05
    assert twins.relative(run.value("sample")["samples"], latents) < 1e-4
    assert twins.relative(run.value("decode").movedim(-1, 1), wanted["pt"]) < 1e-4
