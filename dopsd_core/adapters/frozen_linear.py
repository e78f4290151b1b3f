"""The autograd Function that keeps a frozen Linear's weight out of the graph.

Plain autograd saves the weight for the backward. Inside ComfyUI that weight may be an inference tensor, a recycled
cast buffer or evicted by then. This Function saves nothing: forward is the host's own forward, backward asks the host
for g @ W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..denoiser import LinearSite


class FrozenLinear(torch.autograd.Function):
    """y = site.forward(x), dL/dx = site.grad_input(dL/dy); no gradient of the weight, nothing saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: LinearSite) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., in_features] -> [..., out_features]; grad mode is off here, so the host runs its inference path."""
        ctx.site = site
        ctx.dtype = x.dtype
        return _owned(site.forward(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [..., out_features] -> [..., in_features] in the dtype of x (they differ under autocast)."""
        return ctx.site.grad_input(grad).to(ctx.dtype), None


def frozen_linear(x: Tensor, site: LinearSite) -> Tensor:
    """The site's output for x [..., in_features]; a graph node only where a gradient has to pass through to x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return FrozenLinear.apply(x, site)
    with torch.no_grad():
        out = site.forward(x)
    return _owned(out) if torch.is_grad_enabled() else out


def _owned(out: Tensor) -> Tensor:
    """A clone of a view. Networks write into what a Linear gives them (`img += ...`), and autograd forbids that on a
    view that was made without gradients, as a host's `reshape` of its output is."""
    return out.clone() if out._is_view() else out
