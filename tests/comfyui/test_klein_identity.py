"""ComfyUI's FLUX.2-klein driven by our bridge is diffusers': velocities with and without references, and the gradients
of a LoRA, with and without recomputed blocks.

References stand behind the image's tokens, each at a time coordinate of its own (10, 20, ...). The random weights'
answer depends on every token and on its position, so that one in the wrong place shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import klein_twins
import pytest
import torch
import twins
from gradient import SELECTIVE
from inprocess import ComfyUI
from torch import Tensor

TOLERANCE = 1e-4
SIGMA, RANK, ALPHA = 0.75, 3, 6
DOUBLE, SINGLE = 2, 2
PARTS_OF_DOUBLE = {
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{part}" for name in ("ff", "ff_context") for part in ("linear_in", "linear_out")),
}
PARTS_OF_SINGLE = {"attn.to_qkv_mlp_proj", "attn.to_out"}

Size = tuple[int, int]
# latent (height, width), and of every sample the text's length and the sizes of its references
CASES: dict[str, tuple[Size, list[tuple[int, list[Size]]]]] = {
    "square": ((8, 8), [(512, [])]),
    "wide": ((5, 9), [(512, [])]),
    "a long text": ((6, 4), [(600, [])]),
    "batch": ((5, 9), [(512, []), (512, [])]),
    "batch of lengths": ((5, 7), [(512, []), (600, []), (512, [])]),
    "a reference": ((6, 6), [(512, [(6, 6)])]),
    "a smaller reference": ((6, 8), [(512, [(3, 5)])]),
    "two references": ((6, 4), [(512, [(4, 7), (9, 3)])]),
    "a long text and a reference": ((6, 4), [(513, [(4, 7)])]),
    "batch with references": ((6, 4), [(512, [(4, 7), (9, 3)]), (512, [(4, 7), (9, 3)])]),
    "batch of sizes of references": ((6, 4), [(512, [(4, 7)]), (512, [(7, 4)]), (512, [(4, 7)])]),
    "batch of all kinds": ((6, 4), [(512, []), (512, [(4, 7)]), (600, [(4, 7)]), (512, [(9, 3), (4, 7)]), (512, [])]),
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """x [B, 128, h, w]; B features [L, D], and of every sample its references [128, h, w]."""

    x: Tensor
    features: list[Tensor]
    references: list[tuple[Tensor, ...]]

    def conditions(self, comfyui: ComfyUI) -> list[Any]:
        condition = comfyui.core("conditioning.encode").Condition
        return [condition(f, r) for f, r in zip(self.features, self.references, strict=True)]


@pytest.fixture(scope="module")
def model(comfyui: ComfyUI) -> Any:
    model = klein_twins.model(double=DOUBLE, single=SINGLE)
    assert next(model.model.diffusion_model.parameters()).is_inference()
    return model


@pytest.fixture(scope="module")
def network(model: Any) -> Any:
    return klein_twins.diffusers_klein(model)


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def inputs(request: Any) -> Inputs:
    (height, width), samples = request.param
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(samples), 128, height, width, generator=generator)
    features = [torch.randn(length, 96, generator=generator) for length, _ in samples]
    references = [tuple(torch.randn(128, *size, generator=generator) for size in sizes) for _, sizes in samples]
    return Inputs(x, features, references)


def test_comfyuis_table_of_names_agrees(model: Any, network: Any) -> None:
    """The twins' weights were given diffusers' names by diffusers; ComfyUI's loaders go by a table of their own."""
    from comfy.utils import flux_to_diffusers

    table = flux_to_diffusers(model.model.model_config.unet_config)
    blocks = {name: value for name, value in network.state_dict().items() if "transformer_blocks." in name}
    back, own = twins.fused(blocks, table), model.model.diffusion_model.state_dict()
    assert back.keys() == {name for name in own if name.startswith(("double_blocks.", "single_blocks."))}
    assert all(torch.equal(value, own[name]) for name, value in back.items())


@pytest.mark.parametrize("sigma", [1.0, 0.908144, 0.7172])
def test_velocity(comfyui: ComfyUI, model: Any, network: Any, inputs: Inputs, sigma: float) -> None:
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    with torch.inference_mode(), denoiser.loaded(inputs.x.shape):
        x0 = denoiser.predict_x0(inputs.x, sigma, inputs.conditions(comfyui))
    with torch.no_grad():
        expected = klein_twins.velocity(network, inputs.x, sigma, inputs.features, inputs.references)
    assert expected.std() > 0.1
    for ours, theirs in zip((inputs.x - x0) / sigma, expected, strict=True):
        assert twins.relative(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("num_checkpointed", [0, DOUBLE + 1, DOUBLE + SINGLE, SELECTIVE])
def test_gradients_of_a_lora(comfyui: ComfyUI, model: Any, network: Any, inputs: Inputs, num_checkpointed: int) -> None:
    """Ours through ComfyUI in training mode, theirs through peft; a LoRA that does something already, on every Linear
    of double-stream and single-stream blocks."""
    weight = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(2))
    start = twins.random_student(comfyui, model, RANK)
    conditions = inputs.conditions(comfyui)
    ours_v, ours = twins.our_gradients(
        comfyui, model, start, ALPHA, inputs.x, SIGMA, conditions, weight, num_checkpointed
    )

    def predict() -> Tensor:
        return klein_twins.velocity(network, inputs.x, SIGMA, inputs.features, inputs.references)

    theirs_v, theirs = twins.peft_gradients(network, start, ALPHA, predict, weight)
    assert twins.relative(ours_v, theirs_v) < TOLERANCE
    assert {key.rsplit(".lora_", 1)[0] for key in ours} == {
        *(f"transformer_blocks.{i}.{part}" for i in range(DOUBLE) for part in PARTS_OF_DOUBLE),
        *(f"single_transformer_blocks.{i}.{part}" for i in range(SINGLE) for part in PARTS_OF_SINGLE),
    }
    errors = {key: twins.relative(ours[key], theirs[key]) for key in theirs}
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])
