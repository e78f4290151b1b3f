"""LoKr on one Linear: y = W x + (alpha / rank) * kron(w1, w2) x, w1 [o1, i1], w2 [o2, i2], o1 o2 = rows, i1 i2 = in.

w2 is a product w2_a [o2, rank] w2_b [rank, i2] where the rank is small. The Kronecker product is never formed: with x
as [i1, i2], kron(w1, w2) x = w1 x w2^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..denoiser import LinearSite, SitePart
from .casts import Casts
from .lokr import LokrShape
from .site_weights import joined_rows, part_generator


@dataclass(frozen=True, eq=False)
class LokrWeights:
    """`SiteWeights` of LoKr.

    Attributes:
        site: the Linear.
        parts: its adapted parts.
        scale: alpha / rank.
        w1: one [o1, i1] per part.
        w2: one (w2,) [o2, i2] or (w2_a, w2_b) [o2, rank], [rank, i2] per part.
        casts: what casts w1 and w2.
    """

    site: LinearSite
    parts: tuple[SitePart, ...]
    scale: float
    w1: tuple[Tensor, ...]
    w2: tuple[tuple[Tensor, ...], ...]
    casts: Casts = field(default_factory=Casts, kw_only=True)

    @classmethod
    def fresh(
        cls,
        site: LinearSite,
        parts: tuple[SitePart, ...],
        shapes: tuple[LokrShape, ...],
        scale: float,
        seed: int,
        device: torch.device,
    ) -> Self:
        """New weights: w1 ~ N(0, 1/i1) [o1, i1], w2_b ~ N(0, 1/rank^2) [rank, i2], and w2_a, or w2 in one piece, zero.

        Each part's are a function of (seed, part name) only.
        """
        w1, w2 = [], []
        for part, shape in zip(parts, shapes, strict=True):
            generator = part_generator(seed, part.name)
            drawn = torch.randn(*shape.w1, generator=generator) / shape.w1[1] ** 0.5
            w1.append(nn.Parameter(drawn.to(device)))
            zeros, *rest = shape.w2
            halves = [torch.zeros(zeros), *(torch.randn(*half, generator=generator) / half[0] for half in rest)]
            w2.append(tuple(nn.Parameter(half.to(device)) for half in halves))
        return cls(site, parts, scale, tuple(w1), tuple(w2))

    def tensors(self) -> list[Tensor]:
        """w1 [o1, i1] and w2 [o2, i2], or w2_a [o2, rank] and w2_b [rank, i2], part by part."""
        return [tensor for w1, w2 in zip(self.w1, self.w2, strict=True) for tensor in (w1, *w2)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with changed tensors, of the same shapes."""
        w2 = tuple(tuple(change(half) for half in halves) for halves in self.w2)
        return replace(self, w1=tuple(change(w1) for w1 in self.w1), w2=w2, casts=Casts())

    def views(self) -> dict[str, Tensor]:
        """ "<part>.lokr_w1" [o1, i1]; "<part>.lokr_w2" [o2, i2], or "<part>.lokr_w2_a" and "_b" as in `tensors`."""
        views: dict[str, Tensor] = {}
        for part, w1, w2 in zip(self.parts, self.w1, self.w2, strict=True):
            names = ("lokr_w2",) if len(w2) == 1 else ("lokr_w2_a", "lokr_w2_b")
            views[f"{part.name}.lokr_w1"] = w1
            views |= {f"{part.name}.{name}": half for name, half in zip(names, w2, strict=True)}
        return views

    def derived(self) -> dict[str, Tensor]:
        """Nothing, of any shape."""
        return {}

    def apply(self, base: Tensor, x: Tensor) -> Tensor:
        """base [..., out_features] plus the update of x [..., in_features]."""
        base_2d, x_2d = base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1])
        values = (
            torch.add(base_2d[:, part.rows], self._update(w1, w2, x_2d).to(base.dtype), alpha=self.scale)
            for part, w1, w2 in zip(self.parts, self.w1, self.w2, strict=True)
        )
        return joined_rows(base_2d, self.parts, values).reshape(base.shape)

    def _update(self, w1: Tensor, w2: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """kron(w1, w2) x of a part, [tokens, rows]; x [tokens, in_features]."""
        return _product([self.casts.of(factor, x.dtype) for factor in (w1, *w2)], x)


def _product(factors: list[Tensor], x: Tensor) -> Tensor:
    """kron(w1, w2) x, [tokens, in] -> [tokens, rows]; the factors w1 and w2, or w1, w2_a and w2_b."""
    w1, left, *rest = factors
    hidden = x.unflatten(-1, (w1.shape[1], -1))  # [tokens, i1, i2]
    for right in rest:  # w2_b first, since it makes the intermediate small
        hidden = F.linear(hidden, right)
    if not rest:
        hidden = F.linear(hidden, left)
    hidden = F.linear(hidden.transpose(1, 2), w1).transpose(1, 2)  # [tokens, o1, ...]
    return (F.linear(hidden, left) if rest else hidden).flatten(1)
