"""The gradients that a LoRA gets through a MODEL, as the trainer computes them; on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from inprocess import ComfyUI
from torch import Tensor

SIGMA = 0.7
Between = Callable[[Any, Tensor], None]
"""(denoiser, x): what happens between a forward and its backward."""


SELECTIVE = -1
"""In place of a number of checkpointed blocks: all, and each keeps its products."""


def checkpointed(comfyui: ComfyUI, denoiser: Any, count: int) -> AbstractContextManager[None]:
    """Gradient checkpointing on the first `count` blocks, which keep their inputs alone, or `SELECTIVE`."""
    plan, names = count, [*(site.name for site in denoiser.sites()), comfyui.core("kept_products").ATTENTION]
    if count == SELECTIVE:
        plan = comfyui.core("memory.checkpoint_plan").Checkpointing.keeping(len(denoiser.blocks()), names)
    return comfyui.core("memory.activation_checkpointing").checkpointed(denoiser.blocks(), plan)


def features(comfyui: ComfyUI, model: Any, *lengths: int) -> list[Any]:
    """Random conditions of so many tokens each, on the CPU."""
    condition, generator = comfyui.core("conditioning.encode").Condition, torch.Generator().manual_seed(3)
    width = comfyui.module("nodes.comfy_host.fits").text_width(model)
    return [condition(torch.randn(length, width, generator=generator)) for length in lengths]


def gradients(comfyui: ComfyUI, model: Any, between: Between | None = None, recompute: int = 0) -> list[Tensor]:
    """Of a LoRA whose every weight does something, on the CPU; called as a node is, inside inference mode."""

    def computed() -> list[Tensor]:
        denoiser, generator = (
            comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model),
            torch.Generator().manual_seed(4),
        )
        conditions = [condition.to(denoiser.device) for condition in features(comfyui, model, 11, 20)]
        shape = (2, *denoiser.family.latent_shape(64, 64))
        x = torch.randn(shape, generator=generator).to(denoiser.device)
        with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(shape):
            adapters = comfyui.core("adapters.adapter_set").AdapterSet(
                denoiser.sites(), denoiser.family.lora_config(4), teacher="frozen", device=denoiser.device
            )
            values = {key: torch.randn(v.shape, generator=generator) * 0.05 for key, v in adapters.state().items()}
            adapters.load_state("student", values)
            with adapters.attached(), checkpointed(comfyui, denoiser, recompute):
                out = denoiser.predict_x0(x, SIGMA, conditions)
                if between is not None:
                    with torch.no_grad(), adapters.use("off"):
                        between(denoiser, x)
                out.square().mean().backward()
        found = [parameter.grad for parameter in adapters.parameters()]
        assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in found)
        return [grad.cpu() for grad in found if grad is not None]

    return comfyui.call(computed)


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The distance of two lists of tensors over the length of the second."""
    a, b = (torch.cat([value.float().flatten() for value in values]) for values in (one, other))
    return float((a - b).norm() / b.norm())


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def held(network: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, bytes instead of 8-bit floats."""
    with torch.inference_mode():
        values = network.state_dict()
        return {k: (v.view(torch.uint8) if v.dtype.itemsize == 1 else v).cpu().clone() for k, v in values.items()}
