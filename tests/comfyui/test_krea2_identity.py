"""ComfyUI's Krea 2 through our denoiser computes what diffusers' does: velocities, and the gradients of a LoRA on every
target, with and without gradient checkpointing. Texts have their own lengths, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import krea2_twins
import pytest
import torch
import twins
from gradient import SELECTIVE
from inprocess import ComfyUI
from torch import Tensor

TOLERANCE = 1e-4
SIGMA, RANK, ALPHA = 0.759511, 3, 6
BLOCKS = 2
PARTS = {
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_gate", "to_out.0")),
    *(f"ff.{name}" for name in ("gate", "up", "down")),
}
FUSION = {
    f"text_fusion.{kind}_blocks.{i}.{part}" for kind in ("layerwise", "refiner") for i in (0, 1) for part in PARTS
}

# latent (height, width), and the length of every sample's text
CASES = {
    "square": ((8, 8), [17]),
    "wide": ((4, 10), [3]),
    "a long text": ((6, 4), [600]),
    "batch": ((4, 6), [23, 23]),
    "batch of lengths": ((6, 8), [40, 7, 40]),
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """x [B, 16, h, w]; B features [L, 12 * D]."""

    x: Tensor
    features: list[Tensor]

    def conditions(self, comfyui: ComfyUI) -> list[Any]:
        condition = comfyui.core("conditioning.encode").Condition
        return [condition(features) for features in self.features]


@pytest.fixture(scope="module")
def model(comfyui: ComfyUI) -> Any:
    model = krea2_twins.model(BLOCKS)
    assert next(model.model.diffusion_model.parameters()).is_inference()
    return model


@pytest.fixture(scope="module")
def network(model: Any) -> Any:
    return krea2_twins.diffusers_krea2(model)


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def inputs(request: Any) -> Inputs:
    size, lengths = request.param
    generator = torch.Generator().manual_seed(1)
    width = krea2_twins.TEXT_LAYERS * krea2_twins.TEXT_WIDTH
    x = torch.randn(len(lengths), 16, *size, generator=generator)
    return Inputs(x, [torch.randn(length, width, generator=generator) for length in lengths])


def test_comfyuis_table_of_names_agrees(comfyui: ComfyUI, model: Any, network: Any) -> None:
    """The twins' weights have diffusers' names from diffusers; ComfyUI's LoRA loader uses a table of its own, and so
    does our family."""
    from comfy.utils import krea2_to_diffusers

    table = krea2_to_diffusers(model.model.model_config.unet_config)
    own, theirs = model.model.diffusion_model.state_dict(), network.state_dict()
    assert all(torch.equal(theirs[name], own[native]) for name, native in table.items() if name in theirs)
    sites = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model).sites()
    ours = {part.name: site.name for site in sites for part in site.parts}
    blocks = {name: native for name, native in table.items() if "_blocks." in name and name in theirs}
    assert len(blocks) == 8 * (BLOCKS + 4)
    assert all(ours[name.removesuffix(".weight")] == native.removesuffix(".weight") for name, native in blocks.items())


@pytest.mark.parametrize("sigma", [1.0, 0.904531, 0.310901])
def test_velocity(comfyui: ComfyUI, model: Any, network: Any, inputs: Inputs, sigma: float) -> None:
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    with torch.inference_mode(), denoiser.loaded(inputs.x.shape):
        x0 = denoiser.predict_x0(inputs.x, sigma, inputs.conditions(comfyui))
    with torch.no_grad():
        expected = krea2_twins.velocity(network, inputs.x, sigma, inputs.features)
    assert x0.shape == inputs.x.shape and expected.std() > 0.1
    for ours, theirs in zip((inputs.x - x0) / sigma, expected, strict=True):
        assert twins.relative(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    "num_checkpointed", [0, 4 + BLOCKS - 1, 4 + BLOCKS, SELECTIVE], ids=["none", "some", "all", "selective"]
)
@pytest.mark.parametrize(
    "fusion", [pytest.param(False, marks=pytest.mark.long), True], ids=["blocks", "text fusion too"]
)
def test_gradients_of_a_lora(
    comfyui: ComfyUI, model: Any, network: Any, inputs: Inputs, num_checkpointed: int, fusion: bool
) -> None:
    """Ours through ComfyUI in training mode, theirs through peft; a LoRA that does something already."""
    weight = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(2))
    targets = (*comfyui.core("families").KREA2.lora_targets, *(["text_fusion.*_blocks.*"] if fusion else []))
    start = twins.random_student(comfyui, model, RANK, targets=targets)
    ours_v, ours = twins.our_gradients(
        comfyui, model, start, ALPHA, inputs.x, SIGMA, inputs.conditions(comfyui), weight, num_checkpointed, targets
    )

    def predict() -> Tensor:
        return krea2_twins.velocity(network, inputs.x, SIGMA, inputs.features)

    theirs_v, theirs = twins.peft_gradients(network, start, ALPHA, predict, weight)
    assert twins.relative(ours_v, theirs_v) < TOLERANCE
    wanted = {f"transformer_blocks.{i}.{part}" for i in range(BLOCKS) for part in PARTS}
    assert {key.rsplit(".lora_", 1)[0] for key in ours} == wanted | (FUSION if fusion else set())
    errors = {key: twins.relative(ours[key], theirs[key]) for key in theirs}
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])


def test_a_layer_that_is_not_called_is_an_error(comfyui: ComfyUI) -> None:
    """As in networks that fuse a layer with its activation: a LoRA on it would silently not be trained."""
    model = krea2_twins.model(BLOCKS)
    mlp = model.model.diffusion_model.blocks[1].mlp

    def fused(x: Tensor) -> Tensor:
        weight = mlp.down.weight.clone()
        return torch.nn.functional.linear(torch.nn.functional.silu(mlp.gate(x)) * mlp.up(x), weight)

    mlp.forward = fused
    x, text = torch.randn(1, 16, 4, 4), torch.randn(5, krea2_twins.TEXT_LAYERS * krea2_twins.TEXT_WIDTH)
    condition = comfyui.core("conditioning.encode").Condition(text)
    start = twins.random_student(comfyui, model, RANK)
    with pytest.raises(ValueError, match="computes with 1 layers of the MODEL, such as blocks.1.mlp.down, without"):
        twins.our_gradients(comfyui, model, start, ALPHA, x, SIGMA, [condition], torch.randn(x.shape))
    del mlp.forward
    twins.our_gradients(comfyui, model, start, ALPHA, x, SIGMA, [condition], torch.randn(x.shape))
