"""fp32 weights in the dtype that the network computes in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Casts:
    """Casts the weights of a site: once per change of the weights, or in each forward.

    A kept copy is used by all forwards and recomputations until its weight changes. Gradients reach the weight as those
    of an ordinary cast do, in the weight's dtype and one by one for each use.

    Attributes:
        keeps: whether copies are kept, which takes memory.
    """

    def __init__(self) -> None:
        self.keeps = True
        self._kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, int]] = {}

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, of any shape and always the same object, in this dtype; with a graph where gradients are on."""
        if weight.dtype == dtype:
            return weight
        if not self.keeps or weight.is_inference():  # of which torch does not know whether they have changed
            return weight.to(dtype)
        copy = self._copy(weight, dtype)
        return _KeptCast.apply(weight, copy) if torch.is_grad_enabled() and weight.requires_grad else copy

    def forget(self) -> None:
        """Frees the copies."""
        self._kept.clear()

    def _copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        found = self._kept.get((id(weight), dtype))
        if found is not None and found[2] == weight._version:
            return found[1]
        with torch.inference_mode(False), torch.no_grad():
            copy = weight.detach().to(dtype) if found is None else found[1].copy_(weight)
        self._kept[id(weight), dtype] = (weight, copy, weight._version)
        return copy


@torch.no_grad()
def renew(all_casts: Iterable[Casts]) -> None:
    """Makes the kept copies anew from their weights in one go, also of weights that were changed unseen by torch."""
    places = [(casts, key) for casts in all_casts for key in casts._kept]
    if not places:
        return
    kept = [casts._kept[key] for casts, key in places]
    torch._foreach_copy_([copy for _, copy, _ in kept], [weight.detach() for weight, _, _ in kept])  # pyright: ignore[reportPrivateImportUsage]
    for (casts, key), (weight, copy, _) in zip(places, kept, strict=True):
        casts._kept[key] = (weight, copy, weight._version)


class _KeptCast(torch.autograd.Function):
    """A cast whose result is there already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The copy of the weight, both of the same shape."""
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad of the weight's shape, in the weight's dtype."""
        return grad.to(ctx.dtype), None
