"""LoRA on one Linear: y = W x + (alpha / rank) * B (A x), A [rank, in], B [rows, rank].

A fused projection has one A and B per part; the As are stacked, [parts * rank, in], for a single GEMM. Master weights
are fp32, cast to the compute dtype (`casts.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..denoiser import LinearSite, SitePart
from .casts import Casts
from .site_weights import joined_rows, part_generator


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """`SiteWeights` of LoRA.

    Attributes:
        site: the Linear.
        parts: its adapted parts.
        scale: alpha / rank.
        a: [parts * rank, in_features], stacked.
        b: one [rows, rank] per part.
        casts: what casts a and b.
    """

    site: LinearSite
    parts: tuple[SitePart, ...]
    scale: float
    a: Tensor
    b: tuple[Tensor, ...]
    casts: Casts = field(default_factory=Casts, kw_only=True)

    @classmethod
    def fresh(
        cls, site: LinearSite, parts: tuple[SitePart, ...], rank: int, scale: float, seed: int, device: torch.device
    ) -> Self:
        """New weights: A ~ N(0, 1/rank^2) (peft's "gaussian") [parts * rank, in] and B = 0 [rows, rank].

        Each part's A is a function of (seed, part name) only.
        """
        rows = [torch.randn(rank, site.in_features, generator=part_generator(seed, part.name)) for part in parts]
        a = torch.cat([drawn / rank for drawn in rows]).to(device)
        b = tuple(nn.Parameter(torch.zeros(part.out_features, rank, device=device)) for part in parts)
        return cls(site, parts, scale, nn.Parameter(a), b)

    def tensors(self) -> list[Tensor]:
        """A [parts * rank, in], then B [rows, rank] of each part."""
        return [self.a, *self.b]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with changed A and B, of the same shapes."""
        return replace(self, a=change(self.a), b=tuple(change(b) for b in self.b), casts=Casts())

    def views(self) -> dict[str, Tensor]:
        """ "<part>.lora_A.weight" [rank, in], "<part>.lora_B.weight" [rows, rank]."""
        views: dict[str, Tensor] = {}
        by_part = rearrange(self.a, "(part rank) inputs -> part rank inputs", part=len(self.parts))
        for part, a, b in zip(self.parts, by_part, self.b, strict=True):
            views[f"{part.name}.lora_A.weight"] = a
            views[f"{part.name}.lora_B.weight"] = b
        return views

    def derived(self) -> dict[str, Tensor]:
        """Nothing, of any shape."""
        return {}

    def apply(self, base: Tensor, x: Tensor) -> Tensor:
        """base [..., out_features] plus the low-rank update of x [..., in_features]; W + BA is never formed."""
        base_2d = base.reshape(-1, base.shape[-1])
        values = (
            self._updated(base_2d, part, h, self.casts.of(b, base.dtype).t())
            for part, h, b in zip(self.parts, self.hidden(base, x), self.b, strict=True)
        )
        return joined_rows(base_2d, self.parts, values).reshape(base.shape)

    def _updated(self, base: Tensor, part: SitePart, hidden: Tensor, b: Tensor) -> Tensor:
        """The part's rows [tokens, rows]; of a part that is the whole output and has no graph, in place, which is what
        torch does to a copy otherwise. hidden [tokens, rank], b [rank, rows]."""
        rows = base[:, part.rows]
        is_whole = rows.shape == base.shape
        out = base if is_whole and not torch.is_grad_enabled() else None
        return torch.addmm(base if is_whole else rows, hidden, b, alpha=self.scale, out=out)

    def hidden(self, base: Tensor, x: Tensor) -> Tensor:
        """A x of each part, [parts, tokens, rank], in the dtype of base [..., out]; x [..., in_features]."""
        hidden = F.linear(x.reshape(-1, x.shape[-1]), self.casts.of(self.a, x.dtype)).to(base.dtype)
        return rearrange(hidden, "tokens (part rank) -> part tokens rank", part=len(self.parts))
