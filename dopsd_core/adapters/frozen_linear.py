"""An autograd Function that keeps a frozen Linear's weight out of the graph.

Plain autograd saves the weight for the backward. In ComfyUI that weight may by then be an inference tensor, a reused
cast buffer, or evicted. This Function saves nothing: the forward is the host's own, and the backward asks the host for
g @ W. In a block with gradient checkpointing its output may be kept, so that it is computed once (`kept_products.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..denoiser import LinearSite
from ..kept_products import product


class FrozenLinear(torch.autograd.Function):
    """y = site.forward(x), dL/dx = site.grad_input(dL/dy); no weight gradient, no saved tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: LinearSite) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., in_features] -> [..., out_features]; grad mode is off here, so the host runs its inference path."""
        ctx.site = site
        ctx.dtype = x.dtype
        return product(site.name, lambda: _owned(site.forward(x)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [..., out_features] -> [..., in_features] in the dtype of x (they differ under autocast)."""
        return ctx.site.grad_input(grad).to(ctx.dtype), None


def frozen_linear(x: Tensor, site: LinearSite) -> Tensor:
    """The site's output [..., out_features] for x [..., in_features]; adds a graph node only if x needs a gradient."""
    is_training = torch.is_grad_enabled()
    if is_training and x.requires_grad:
        if x.grad_fn is not None and x.grad_fn.name().startswith("CatBackward"):
            x.grad_fn.register_hook(_in_own_memory)
        return FrozenLinear.apply(x, site)
    with torch.no_grad():
        if not is_training:
            return site.forward(x)
        return product(site.name, lambda: _owned(site.forward(x)))


def _in_own_memory(grads: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
    """The gradients of what was concatenated along the features, of any shape: torch's are views of that of the whole,
    which would stay in memory until the last of them is used. All but the largest are copied, so that it is freed with
    that one. FLUX's single-stream blocks concatenate attention and MLP, whose backward has their peak."""
    largest = max((grad.numel() for grad in grads if grad is not None), default=0)
    return tuple(
        grad if grad is None or grad.numel() == largest or grad.is_contiguous() else grad.contiguous() for grad in grads
    )


def _owned(out: Tensor) -> Tensor:
    """Clones views. Networks write in place into the output of a Linear (`img += ...`), which autograd forbids on a
    view created without gradients, such as a host's `reshape` of its output."""
    return out.clone() if out._is_view() else out
