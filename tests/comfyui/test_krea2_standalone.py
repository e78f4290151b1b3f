"""The host of Krea 2 without ComfyUI computes what the one inside ComfyUI does: predictions, gradients, texts, what the
teacher sees, latents and images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import krea2_twins
import pytest
import torch
import twins
from inprocess import ComfyUI
from safetensors.torch import save_file
from torch import Tensor

CAPTION = "a badge in the style of [V], top"


@pytest.fixture(scope="module")
def hosts(comfyui: ComfyUI) -> SimpleNamespace:
    """Denoiser and encoder of both hosts, with the same weights."""
    return comfyui.call(make_hosts, comfyui)


def make_hosts(comfyui: ComfyUI) -> SimpleNamespace:
    model, (clip, qwen), (vae, their_vae) = krea2_twins.model(), krea2_twins.clips(), krea2_twins.vaes()
    alone, inside = comfyui.core("standalone.hosts.krea2"), comfyui.module("nodes.comfy_host.encoder")
    return SimpleNamespace(
        model=model, inside=inside.ComfyEncoder(clip, vae, None), vae=vae,
        denoiser=alone.Krea2Denoiser(krea2_twins.diffusers_krea2(model)),
        encoder=alone.Krea2Encoder(qwen, krea2_twins.tokenizer(clip), their_vae, "small"),
    )  # fmt: skip


def image(height: int, width: int) -> Tensor:
    """[3, H, W] in [0, 1]."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]


def in_comfyui(comfyui: ComfyUI, function: Any, *args: Any) -> Any:
    return comfyui.call(torch.inference_mode()(function), *args)


def test_predictions(comfyui: ComfyUI, hosts: SimpleNamespace) -> None:
    """Of a batch of texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, 6, 10, generator=generator)
    width = krea2_twins.TEXT_LAYERS * krea2_twins.TEXT_WIDTH
    features = [torch.randn(length, width, generator=generator) for length in (9, 40, 9)]
    conditions = [comfyui.core("conditioning.encode").Condition(value) for value in features]
    with comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(hosts.model).loaded(x.shape) as denoiser:
        wanted = in_comfyui(comfyui, denoiser.predict_x0, x, 0.75, conditions)
    with torch.no_grad():
        got = hosts.denoiser.predict_x0(x, 0.75, conditions)
    assert twins.relative(got, wanted) < 1e-5


def test_both_have_the_same_parts_in_the_same_blocks(comfyui: ComfyUI, hosts: SimpleNamespace) -> None:
    inside = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(hosts.model)

    def parts(denoiser: Any) -> list[list[str]]:
        names = {site.module: [part.name for part in site.parts] for site in denoiser.sites()}
        return [sorted(name for m in block.modules() for name in names.get(m, [])) for block in denoiser.blocks()]

    assert parts(inside) == parts(hosts.denoiser)
    chosen = [comfyui.core("families").KREA2.lora_config().chosen(host.sites()) for host in (inside, hosts.denoiser)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 2 * 8


def test_conditions(comfyui: ComfyUI, hosts: SimpleNamespace) -> None:
    for caption in (CAPTION, ""):
        wanted = in_comfyui(comfyui, hosts.inside.encode_text, caption).features
        assert twins.relative(hosts.encoder.encode_text(caption).features, wanted) < 1e-5
    for height, width in ((512, 640), (96, 160), (1024, 768)):
        wanted = in_comfyui(comfyui, hosts.inside.encode_image_text, image(height, width), CAPTION).features
        got = hosts.encoder.encode_image_text(image(height, width), CAPTION).features
        assert twins.relative(got, wanted) < 1e-4


def test_latents_and_images(comfyui: ComfyUI, hosts: SimpleNamespace) -> None:
    latent = hosts.encoder.encode_latent(image(64, 96))
    assert twins.relative(latent, in_comfyui(comfyui, hosts.inside.encode_latent, image(64, 96))) < 1e-4
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(hosts.model)
    decode_image = comfyui.module("nodes.comfy_host.sampling").decode_image
    wanted = in_comfyui(comfyui, lambda: decode_image(hosts.vae, denoiser.to_vae_space(latent[None])))
    assert twins.relative(hosts.encoder.decode(latent[None])[0].movedim(0, -1), wanted.float()) < 1e-4


def test_comfyuis_single_file_of_the_transformer(comfyui: ComfyUI, hosts: SimpleNamespace, tmp_path: Path) -> None:
    """As `--model` reads it: under ComfyUI's names, with the configuration of a folder in diffusers' layout."""
    network = hosts.model.model.diffusion_model
    file, folder = tmp_path / "krea2_turbo_bf16.safetensors", tmp_path / "base"
    save_file({name: value.clone() for name, value in network.state_dict().items()}, file)
    hosts.denoiser.transformer.save_config(folder / "transformer")
    source, parts = (comfyui.core(f"standalone.hosts.{name}") for name in ("source", "parts"))
    options = comfyui.core("standalone.model_options").ModelOptions(model=str(file), dtype="fp32", device="cpu")
    known = source.find_family(options)
    loaded = parts.ModelParts(source.ModelFiles(known, folder, transformer=file), options)
    got = loaded.transformer(type(hosts.denoiser.transformer)).state_dict()
    wanted = hosts.denoiser.transformer.state_dict()
    assert known.family == "krea2" and got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_images_of_a_report_card_have_no_time_axis(comfyui: ComfyUI, hosts: SimpleNamespace) -> None:
    lora = SimpleNamespace(vae=hosts.vae, model=hosts.model)
    painter = comfyui.module("nodes.comfy_host.card")._Painter(lora, 8, lambda: None)
    latent = torch.randn(1, 16, 1, 6, 8, generator=torch.Generator().manual_seed(2))
    drawn = in_comfyui(comfyui, painter._decode, latent)
    wanted = in_comfyui(comfyui, hosts.vae.decode, latent)[0, 0].permute(2, 0, 1)
    assert drawn.shape == (3, 48, 64) and twins.relative(drawn.float(), wanted.float().clamp(0, 1)) < 1e-3
