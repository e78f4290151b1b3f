"""The diffusers hosts and ComfyUI's on the same small weights: conditions, velocities, trainings, LoRA files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import klein_twins
import pytest
import torch
import towers
import toy
import twins
from inprocess import ComfyUI
from PIL import Image
from safetensors.torch import load_file

TEXT = "a [V] badge, top, on a sand background"
CHAT = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
"""What Qwen3's chat template makes of one message with thinking."""
LAYERS = {"z_image": 5, "klein": 28}
STEPS = 10


def autoencoders() -> tuple[Any, Any]:
    """(ComfyUI's VAE, diffusers' AutoencoderKL) of 16 channels, with Z-Image's normalisation."""
    import comfy.sd
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kinds: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4,
    }  # fmt: skip
    theirs = AutoencoderKL(
        latent_channels=16, layers_per_block=1, scaling_factor=0.3611,
        shift_factor=0.1159, **kinds,
    )  # fmt: skip
    toy.fill(theirs, 4)
    shape = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.inference_mode():
        config = {"params": {"ddconfig": shape, "embed_dim": 16}}
        ours = comfy.sd.VAE(sd=dict(theirs.state_dict()), config=config, dtype=torch.float32)
    ours.downscale_ratio = ours.upscale_ratio = 8
    ours.latent_channels = 16
    return ours, theirs.eval().requires_grad_(False)


def text_encoder(clip: Any, layers: int) -> Any:
    """transformers' Qwen3 with the CLIP's weights."""
    from transformers import Qwen3Config, Qwen3Model

    sizes: dict[str, Any] = {**towers.LANGUAGE, "num_hidden_layers": layers, "vocab_size": 151936, "head_dim": 128}
    model = Qwen3Model(Qwen3Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    model.load_state_dict(clip.cond_stage_model.qwen3_4b.transformer.model.state_dict())
    return model


def write_folder(folder: Path, family: str, clip: Any, transformer: Any, vae: Any) -> Path:
    tokenizer = clip.tokenizer.qwen3_4b.tokenizer
    tokenizer.chat_template = CHAT if family == "z_image" else klein_twins.CHAT  # ComfyUI never reads it
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder(clip, LAYERS[family])}
    for name, part in {**parts, "tokenizer": tokenizer}.items():
        part.save_pretrained(folder / name)
    pipeline = "ZImagePipeline" if family == "z_image" else "Flux2KleinPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
    return folder


def write_vision(folder: Path, spec: Any, state: dict[str, torch.Tensor]) -> Path:
    from transformers import Qwen3VLConfig

    file = towers.in_a_file(folder / "vision.safetensors", state)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    Qwen3VLConfig(vision_config=dict(spec.tower), text_config={"rope_parameters": rope}).save_pretrained(folder)
    return file


@pytest.fixture(scope="module", params=["z_image", pytest.param("klein", marks=pytest.mark.long)])
def hosts(request: pytest.FixtureRequest, comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One model twice: `.encoder`, `.denoiser` of the nodes, and `.model` of the standalone host."""
    return comfyui.call(make_hosts, comfyui, request.param, tmp_path_factory.mktemp(request.param))


def make_hosts(comfyui: ComfyUI, family: str, place: Path) -> Any:
    vision_module = comfyui.module("nodes.comfy_host.vision")
    spec = towers.tiny(vision_module)
    _, state = towers.reference(spec)
    clip = towers.clip(family)
    if family == "z_image":
        transformer = twins.diffusers_z_image(text_width=towers.WIDTH)
        model, (vae, their_vae) = twins.as_model(transformer), autoencoders()
    else:
        model, (vae, their_vae) = klein_twins.model(text_width=3 * towers.WIDTH), klein_twins.vaes()
        transformer = klein_twins.diffusers_klein(model)
    folder = write_folder(place / "model", family, clip, transformer, their_vae)
    (place / "vision").mkdir()
    file = write_vision(place / "vision", spec, state)
    vision = comfyui.module("nodes.comfy_host.vision_file").load_teacher_vision(file, spec)
    vision.model.float()
    options = comfyui.core("standalone.model_options").ModelOptions(
        model=str(folder), vision=str(file), dtype="fp32", device="cpu"
    )
    return SimpleNamespace(
        family=family,
        encoder=comfyui.module("nodes.comfy_host.encoder").ComfyEncoder(clip, vae, vision),
        denoiser=comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model),
        model=comfyui.core("standalone.hosts.model").load_model(options, True),
    )


def seeded(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", [TEXT, "", "[V] " * 90])
def test_conditions_of_texts(hosts: Any, text: str) -> None:
    ours, theirs = (encoder.encode_text(text).features for encoder in (hosts.model.encoder, hosts.encoder))
    assert twins.relative(ours, theirs) < 1e-3


@pytest.mark.parametrize(("height", "width", "words"), [(512, 768, TEXT), (96, 80, ""), (512, 512, "badge, " * 500)])
def test_conditions_of_images_with_captions(hosts: Any, height: int, width: int, words: str) -> None:
    """The last caption is longer than fits beside the image's tokens."""
    image = seeded(3, height, width)
    ours, theirs = (e.encode_image_text(image, words).features for e in (hosts.model.encoder, hosts.encoder))
    assert twins.relative(ours, theirs) < 1e-3


def test_latents(hosts: Any) -> None:
    ours, theirs = (e.encode_latent(seeded(3, 96, 64)) for e in (hosts.model.encoder, hosts.encoder))
    assert twins.relative(ours, theirs) < 1e-3


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.1])
def test_velocities(comfyui: ComfyUI, hosts: Any, sigma: float) -> None:
    """Also of captions of two lengths in one batch, and for klein with a reference."""
    Condition = comfyui.core("conditioning.encode").Condition
    short, long = (hosts.encoder.encode_text(text).features for text in (TEXT, TEXT * 30))
    x = torch.randn(2, *hosts.model.family.latent_shape(96, 64), generator=torch.Generator().manual_seed(1))
    references = (x[1] * 0.5,) if hosts.family == "klein" else ()
    conditions = [Condition(short), Condition(long, references)]
    with torch.no_grad():
        ours = (x - hosts.model.denoiser.predict_x0(x, sigma, conditions)) / sigma
    with hosts.denoiser.loaded(x.shape), torch.no_grad():
        theirs = (x - hosts.denoiser.predict_x0(x, sigma, conditions)) / sigma
    assert twins.relative(ours, theirs) < 1e-3


def test_linears_have_the_same_parts(hosts: Any) -> None:
    ours, theirs = (
        {part.name for site in d.sites() for part in site.parts} for d in (hosts.model.denoiser, hosts.denoiser)
    )
    targets = hosts.model.family.lora_targets
    inside = [{n for n in names if any(n.endswith(t) for t in targets)} for names in (ours, theirs)]
    assert inside[0] == inside[1] and inside[0]


def test_ten_steps_make_the_same_lora(comfyui: ComfyUI, hosts: Any, tmp_path: Path) -> None:
    data = {name: training_set(comfyui, hosts, encoder, tmp_path / "images") for name, encoder in (
        ("diffusers", hosts.model.encoder), ("comfyui", hosts.encoder)
    )}  # fmt: skip
    config = comfyui.core("config").TrainConfig(
        family=hosts.model.family.name, steps=STEPS, probe_every=5, rollout_steps=2, grad_accumulation=2,
        adapter=hosts.model.family.lora_config(4),
        objective=comfyui.core("objectives").DOPSD(anchor_probability=0.0),
        optimizer=comfyui.core("optimizers").AdamW(lr=1e-3),
    )  # fmt: skip
    train = comfyui.core("training.trainer").train
    facts = {"dopsd_base_model": "the same"}
    train(config, hosts.model.denoiser, data["diffusers"], tmp_path / "diffusers", facts=facts)
    with hosts.denoiser.trainable((1, *hosts.model.family.latent_shape(64, 64))):
        train(config, hosts.denoiser, data["comfyui"], tmp_path / "comfyui", facts=facts)
    ours, theirs = (load_file(tmp_path / name / "lora.safetensors") for name in ("diffusers", "comfyui"))
    assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in theirs.items()}
    states = [load_file(newest(tmp_path / name) / "lora.safetensors") for name in ("diffusers", "comfyui")]
    assert states[0].keys() == states[1].keys()
    for kind in ("lora_A", "lora_B"):
        flat = [torch.cat([v.flatten() for n, v in sorted(state.items()) if kind in n]) for state in states]
        assert twins.relative(*flat) < 1e-3, kind
    gaps = [gap(comfyui, tmp_path / name) for name in ("diffusers", "comfyui")]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3) and gaps[0] < 1


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def gap(comfyui: ComfyUI, folder: Path) -> float:
    return comfyui.core("training.log").read_log(folder / "train.jsonl")[-1].relative_gap


def training_set(comfyui: ComfyUI, hosts: Any, encoder: Any, folder: Path) -> Any:
    """Two images: of klein, the teacher gets them as references, of Z-Image through the vision tower."""
    folder.mkdir(exist_ok=True)
    for name, colour in (("a", "red"), ("b", "navy")):
        image = Image.new("RGB", (64, 64), colour)
        image.paste("white", (10, 20, 40, 50))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a [V] badge, {name}", encoding="utf-8")
    pairs = comfyui.core("data.dataset").read_dataset(folder, pixel_budget=64 * 64, multiple=16).pairs
    views = comfyui.core("conditioning.teachers").TEACHER_VIEWS
    view = views[hosts.model.teachers[0]]
    return comfyui.core("training.training_set").build_training_set(pairs, encoder, teacher=view)
