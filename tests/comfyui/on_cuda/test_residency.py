"""Wherever ComfyUI has the weights, gradients and trainings are the same to the bit, and the MODEL stays what it was.

Classic: loaded whole, half, or not at all, streamed from RAM for each use. Dynamic VRAM: pages evicted at random,
faults refused, cast buffers overwritten; and all of that in every single use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from bases import (
    EVERY_FORM,
    Load,
    drawn,
    equal,
    gradients,
    is_dynamic,
    learned,
    left_in_ram,
    relative,
    resident,
    same,
    train,
    unload,
    weights,
)
from gradient import SELECTIVE
from inprocess import ComfyUI
from loras import random_lora
from pretend_cuda import aimdo
from torch import Tensor

Elsewhere = Callable[[], AbstractContextManager[None]]

ALWAYS = aimdo.Chances(evict=1.0, refuse=1.0)


@pytest.fixture
def whole(comfyui: ComfyUI) -> Elsewhere:
    """Inside, weights are loaded once and stay."""
    return lambda: aimdo.chances(aimdo.CALM) if is_dynamic() else resident(comfyui, 1.0)


@pytest.fixture(params=["some", "all"])
def streamed(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Elsewhere:
    """Inside, some or all of the weights are brought for each use."""
    some = request.param == "some"
    if is_dynamic():
        return lambda: aimdo.chances(aimdo.Chances() if some else ALWAYS)
    return lambda: resident(comfyui, 0.5 if some else 0.0)


def teacher(denoiser: Any, x: Tensor, pairs: Any, adapters: Any) -> None:
    """What an optimizer step does between the student's forward and its backward."""
    with torch.no_grad(), adapters.use("off"):
        denoiser.predict_x0(x, 0.4, [pair.teacher for pair in pairs])


def was_streamed(model: Any, before: int) -> bool:
    return aimdo.count["refused"] > before if is_dynamic() else len(left_in_ram(model)) > 10


@pytest.mark.parametrize("form", EVERY_FORM)
def test_gradients(comfyui: ComfyUI, load: Load, whole: Elsewhere, streamed: Elsewhere, form: str) -> None:
    model = load(form)
    drawn(comfyui, model)
    held = weights(model)  # as loaded: dynamic VRAM quantises scaled fp8 Linears under 16 KiB anew
    with whole():
        wanted = gradients(comfyui, model)
        assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in wanted)
        assert equal(gradients(comfyui, model, 2, teacher), wanted)
    with streamed():
        drawn(comfyui, model)  # a KSampler before leaves its cast buffers, made in inference mode
        refused = aimdo.count["refused"]
        assert equal(gradients(comfyui, model, 0, teacher), wanted)
        assert was_streamed(model, refused)
        assert equal(gradients(comfyui, model, 99, teacher), wanted)
        assert equal(gradients(comfyui, model, SELECTIVE, teacher), wanted)
    assert same(weights(model), held) and aimdo.still_pinned() == 0


@pytest.mark.parametrize("form", ["fp32", "klein"])
def test_gradients_on_a_patched_model(
    comfyui: ComfyUI, load: Load, whole: Elsewhere, streamed: Elsewhere, form: str
) -> None:
    """A LoRA on the base is put on in each use, or once: ComfyUI then multiplies it out in 16 bits or in 32."""
    model = load(form)
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    loader = comfyui.nodes.NODE_CLASS_MAPPINGS["LoraModelLoader"]
    patched = comfyui.call(lambda: loader.execute(model, lora, 1.0).args[0])
    with whole():
        base, wanted = gradients(comfyui, model), gradients(comfyui, patched)
    assert relative(base, wanted) > 0.1
    with streamed():
        assert relative(gradients(comfyui, patched, 2, teacher), wanted) < 3e-3
        assert equal(gradients(comfyui, model), base)


@pytest.mark.parametrize("form", EVERY_FORM)
def test_trainings(comfyui: ComfyUI, load: Load, whole: Elsewhere, form: str) -> None:
    """In the way of the mode itself; afterwards the MODEL samples the same."""
    model = load(form)
    with whole():
        before, held = drawn(comfyui, model), weights(model)
        wanted = train(comfyui, model, f"whole-{form}")
    unload(comfyui)
    run = train(comfyui, model, f"as-it-comes-{form}")
    assert all(math.isfinite(loss) for loss in run.value("train", 1)["loss"])
    assert all(b.abs().max() > 0 for b in learned(run))
    assert same(run.value("train"), wanted.value("train"))
    assert torch.equal(drawn(comfyui, model), before) and same(weights(model), held)
    assert aimdo.still_pinned() == 0
