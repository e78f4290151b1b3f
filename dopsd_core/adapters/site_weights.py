"""The interface of an adapter's weights on one Linear."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from ..denoiser import LinearSite, SitePart
from .casts import Casts

DERIVED = (".dora_scale",)
"""Ends of the names of `SiteWeights.derived`; they are ignored when a state is loaded."""


class SiteWeights(Protocol):
    """The weights of the adapted parts of one site, for the student or for the teacher."""

    @property
    def site(self) -> LinearSite:
        """The site."""
        ...

    @property
    def parts(self) -> tuple[SitePart, ...]:
        """The adapted parts, in row order."""
        ...

    @property
    def casts(self) -> Casts:
        """What casts them to the compute dtype."""
        ...

    def tensors(self) -> list[Tensor]:
        """The trained tensors, fp32, in the shapes that the optimizer sees."""
        ...

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every trained tensor replaced by `change(tensor)`, of the same shape, and casts of its own."""
        ...

    def views(self) -> dict[str, Tensor]:
        """Views of the trained tensors under the names and in the shapes of `Trainable.state`."""
        ...

    def derived(self) -> dict[str, Tensor]:
        """What files need besides and what follows from weights and base, by name and of any shape; usually empty."""
        ...

    def apply(self, base: Tensor, x: Tensor) -> Tensor:
        """The adapted output of the Linear, from its own, base [..., out_features], and its input x [..., in].

        Where gradients are off it may be written into base.
        """
        ...


def joined_rows(base: Tensor, parts: Sequence[SitePart], values: Iterable[Tensor]) -> Tensor:
    """base [tokens, out_features] with the rows of each part replaced by its value [tokens, rows].

    Where gradients are off they are replaced in base, so that with values made one by one only one is in memory.
    """
    if not torch.is_grad_enabled() and parts[0].out_features < base.shape[1]:
        made = iter(values)
        for part in parts:
            base[:, part.rows] = next(made)  # without a name, which would keep it while the next one is made
        return base
    segments: list[Tensor] = []
    end = 0
    for part, value in zip(parts, values, strict=True):
        if part.start > end:
            segments.append(base[:, end : part.start])
        segments.append(value)
        end = part.stop
    if end < base.shape[1]:
        segments.append(base[:, end:])
    return segments[0] if len(segments) == 1 else torch.cat(segments, dim=1)


def part_generator(seed: int, name: str) -> torch.Generator:
    """The generator of a part's initial weights."""
    return torch.Generator().manual_seed(part_seed(seed, name))


def part_seed(seed: int, name: str) -> int:
    """A seed in 0..2^63-1 for one part, a function of (seed, name) only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
