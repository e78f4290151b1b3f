"""DoRA on one Linear (arXiv 2402.09353): y = m (W + s B A) x / ||W + s B A||, with norms of rows and s = alpha / rank.

The norm counts as a constant in the backward (the paper's section 4.3), as in peft. It is computed without forming the
matrix, from W A^T, which is the Linear's own forward of the rows of A:

||W + s B A||^2 = ||W||^2 + 2 s (W A^T . B) + s^2 (B A A^T . B), with sums over the columns of B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..denoiser import LinearSite, SitePart
from .dora import no_weight
from .lora_weights import LoraWeights
from .site_weights import joined_rows

_TINY = 1e-12
"""Smallest norm of a row; those of a zero weight have it."""


@dataclass(frozen=True, eq=False)
class DoraWeights(LoraWeights):
    """`SiteWeights` of DoRA.

    Attributes:
        magnitude: m, one [rows, 1] per part.
        base_norms: ||W||, [out_features].
    """

    magnitude: tuple[Tensor, ...]
    base_norms: Tensor

    @classmethod
    def fresh(
        cls, site: LinearSite, parts: tuple[SitePart, ...], rank: int, scale: float, seed: int, device: torch.device
    ) -> Self:
        """A and B as for LoRA, and m = ||W|| [rows, 1], so that the start is the base bit for bit.

        Raises:
            ValueError: the host cannot provide the weight of the site.
        """
        lora = LoraWeights.fresh(site, parts, rank, scale, seed, device)
        norms = dense_weight(site, device).norm(dim=1).clamp(min=_TINY)
        magnitude = tuple(nn.Parameter(norms[part.rows, None].clone()) for part in parts)
        return cls(site, parts, scale, lora.a, lora.b, magnitude, norms)

    def tensors(self) -> list[Tensor]:
        """A [parts * rank, in], B [rows, rank] of each part, m [rows, 1] of each part."""
        return [*super().tensors(), *self.magnitude]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with changed A, B and m, of the same shapes."""
        return replace(super().mapped(change), magnitude=tuple(change(m) for m in self.magnitude))

    def views(self) -> dict[str, Tensor]:
        """Those of LoRA and "<part>.lora_magnitude_vector" [rows]."""
        pairs = zip(self.parts, self.magnitude, strict=True)
        return {**super().views(), **{f"{part.name}.lora_magnitude_vector": m[:, 0] for part, m in pairs}}

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        """ "<part>.dora_scale" [rows, 1] for ComfyUI, which divides by ||W|| instead: m ||W|| / ||W + s B A||."""
        weight, found = dense_weight(self.site, self.a.device), {}
        for part, a, b, m in self._by_part():
            norms = torch.addmm(weight[part.rows], b, a, alpha=self.scale).norm(dim=1, keepdim=True).clamp(min=_TINY)
            found[f"{part.name}.dora_scale"] = m * self.base_norms[part.rows, None] / norms
        return found

    def apply(self, base: Tensor, x: Tensor) -> Tensor:
        """m (W + s B A) x / ||W + s B A|| plus bias, from base [..., out_features] = W x + bias and x [..., in]."""
        base_2d = base.reshape(-1, base.shape[-1])
        products, bias = self._products(x.dtype)
        of_parts = products.chunk(len(self.parts))
        values = (
            self._scaled(base_2d, bias, h, of_part, *weights)
            for h, of_part, weights in zip(self.hidden(base, x), of_parts, self._by_part(), strict=True)
        )
        return joined_rows(base_2d, self.parts, values).reshape(base.shape)

    def _scaled(
        self,
        base: Tensor,
        bias: Tensor,
        hidden: Tensor,
        products: Tensor,
        part: SitePart,
        a: Tensor,
        b: Tensor,
        m: Tensor,
    ) -> Tensor:
        """The part's rows [tokens, rows]; bias [out], hidden [tokens, rank], products: A W^T [rank, out]."""
        norms = self._norms(part, a, b, products[:, part.rows])
        # a factor near 1 would be rounded away in 16 bits, so that its difference from 1 is used
        gain = (m / norms - 1).to(base.dtype).t()
        updated = self._updated(base, part, hidden, self.casts.of(b, base.dtype).t())
        return updated + gain * (updated - bias[part.rows])

    def _by_part(self) -> list[tuple[SitePart, Tensor, Tensor, Tensor]]:
        parts = self.a.chunk(len(self.parts))
        return list(zip(self.parts, parts, self.b, self.magnitude, strict=True))

    @torch.no_grad()
    def _products(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(A W^T [parts * rank, out], bias [out]) in `dtype`, by a forward of the Linear."""
        rows = torch.cat([self.casts.of(self.a, dtype), torch.zeros_like(self.a[:1], dtype=dtype)])
        out = self.site.forward(rows)
        return out[:-1].float() - out[-1].float(), out[-1]

    @torch.no_grad()
    def _norms(self, part: SitePart, a: Tensor, b: Tensor, products: Tensor) -> Tensor:
        """||W + s B A|| of the part's rows, [rows, 1], fp32; products: A W^T [rank, rows]."""
        cross = (products.t() * b).sum(dim=1, keepdim=True)
        square = (b @ (a @ a.t()) * b).sum(dim=1, keepdim=True)
        base = self.base_norms[part.rows, None]
        return (base * base + 2 * self.scale * cross + self.scale**2 * square).clamp(min=_TINY**2).sqrt()


def dense_weight(site: LinearSite, device: torch.device) -> Tensor:
    """The weight of a site, [out_features, in_features], fp32.

    Raises:
        ValueError: the host cannot provide it.
    """
    if site.weight is None:
        raise no_weight(site)
    return site.weight(device)
