"""ComfyUI's Z-Image driven by our bridge is diffusers' Z-Image: velocities, and the gradients of a LoRA.

Text and image are padded to multiples of 32 tokens, each in its own way in either library. The weights are random and
all different from zero, the padding tokens too, so that a pad in the wrong place or attended to otherwise shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import twins
from gradient import SELECTIVE
from inprocess import ComfyUI
from torch import Tensor

TOLERANCE = 1e-4
SIGMA, RANK, ALPHA = 0.75, 3, 6
# (latent height, latent width, text lengths); tokens of the image are height * width / 4
CASES = {
    "nothing to pad": (16, 16, (32,)),
    "text to pad": (16, 16, (7,)),
    "image to pad": (10, 6, (64,)),
    "both to pad": (18, 22, (45,)),
    "one over": (2, 66, (33,)),
    "batch of one length": (10, 6, (21, 21)),
    "batch of lengths with one padded size": (10, 14, (3, 31)),
    "batch of all lengths": (10, 14, (9, 32, 77)),
}


@pytest.fixture(scope="module")
def pair(comfyui: ComfyUI) -> tuple[Any, Any]:
    """diffusers' network and ComfyUI's MODEL with its weights."""
    network = twins.diffusers_z_image()
    model = twins.as_model(network)
    assert next(model.model.diffusion_model.parameters()).is_inference()
    return network, model


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def inputs(request: Any) -> tuple[Tensor, list[Tensor]]:
    height, width, lengths = request.param
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), 16, height, width, generator=generator)
    return x, [torch.randn(length, 64, generator=generator) for length in lengths]


@pytest.mark.parametrize("sigma", [1.0, 0.75, 0.3])
def test_velocity(comfyui: ComfyUI, pair: Any, inputs: Any, sigma: float) -> None:
    network, model = pair
    x, features = inputs
    condition = comfyui.core("conditioning.encode").Condition
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    with torch.inference_mode(), denoiser.loaded(x.shape):
        x0 = denoiser.predict_x0(x, sigma, [condition(f) for f in features])
    with torch.no_grad():
        expected = twins.velocity(network, x, sigma, features)
    assert expected.std() > 0.1
    for ours, theirs in zip((x - x0) / sigma, expected, strict=True):
        assert twins.relative(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("num_checkpointed", [0, SELECTIVE], ids=["none", "selective"])
def test_gradients_of_a_lora(comfyui: ComfyUI, pair: Any, inputs: Any, num_checkpointed: int) -> None:
    """Ours through ComfyUI in training mode, theirs through peft; a LoRA that does something already."""
    network, model = pair
    x, features = inputs
    conditions = [comfyui.core("conditioning.encode").Condition(f) for f in features]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    start = twins.random_student(comfyui, model, RANK)
    ours_v, ours = twins.our_gradients(comfyui, model, start, ALPHA, x, SIGMA, conditions, weight, num_checkpointed)
    theirs_v, theirs = twins.peft_gradients(
        network, start, ALPHA, lambda: twins.velocity(network, x, SIGMA, features), weight
    )
    assert twins.relative(ours_v, theirs_v) < TOLERANCE
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 4
    errors = {key: twins.relative(ours[key], theirs[key]) for key in theirs}
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])
