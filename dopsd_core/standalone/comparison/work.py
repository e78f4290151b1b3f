"""Counts the work of training in FLOPs, which does not depend on what else the machine does."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...adapters.adapter_set import AdapterSet, owner_of
from ...conditioning.encode import Condition
from ...denoiser import Denoiser


class CountedDenoiser:
    """A denoiser that counts the FLOPs of its forwards, and of the backward of those with a graph.

    A call is measured once for each number of samples, tokens, grad mode and weights; every later one is counted alike.

    Attributes:
        flops: all so far.
    """

    _known: ClassVar[dict[Hashable, float]] = {}  # of all instances, which differ in nothing that is not in the keys

    def __init__(self, denoiser: Denoiser) -> None:
        """denoiser: of the demo, whose attention is plain products on a CPU."""
        self._denoiser = denoiser
        self.flops = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x0_hat [B, C, h, w] of x [B, C, h, w], as the denoiser's own."""
        self.flops += self.cost(x, conditions)
        return self._denoiser.predict_x0(x, sigma, conditions)

    def cost(self, x: Tensor, conditions: Sequence[Condition]) -> float:
        """FLOPs of a forward of x [B, C, h, w], and of its backward if grad mode is on and it has a graph."""
        owner = next((owner for site in self._denoiser.sites() if (owner := owner_of(site.module))), None)
        trained = owner.parameters() if owner is not None and torch.is_grad_enabled() else []
        key = (
            *(id(type(self._denoiser)), tuple(x.shape), tuple(len(condition.features) for condition in conditions)),
            *(_weights(owner), len(trained)),
        )
        if key not in self._known:
            self._known[key] = self._measured(x, conditions, trained)
        return self._known[key]

    def _measured(self, x: Tensor, conditions: Sequence[Condition], trained: Sequence[Tensor]) -> float:
        with FlopCounterMode(display=False) as counter:
            x0 = self._denoiser.predict_x0(x, 0.5, conditions)
            if x0.requires_grad:
                torch.autograd.grad(x0.sum(), list(trained), allow_unused=True)
        return float(counter.get_total_flops())


def _weights(owner: AdapterSet | None) -> Hashable:
    """What the cost of a forward depends on: whether an adapter computes, and its size."""
    if owner is None or owner.mode == "off" or (owner.mode == "teacher" and owner.teacher.weights == "base"):
        return None
    return owner.mode == "student", type(owner.config).__name__, sum(p.numel() for p in owner.parameters())
