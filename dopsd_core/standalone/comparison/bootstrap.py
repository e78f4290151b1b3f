"""Bootstrap intervals over concepts and seeds.

Concepts are resampled, and within each its seeds: the few seeds of one concept are no independent evidence for others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval.

    Attributes:
        mean: mean over concepts and seeds.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval counts as one; rounding does not."""
        return self.low > _ROUNDING or self.high < -_ROUNDING


def interval(values: Tensor, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The interval of the mean of values [concepts, seeds]; for a paired comparison, of the differences.

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    if values.ndim != 2 or not values.numel() or not torch.isfinite(values).all():
        raise ValueError(f"finite values of at least one concept and seed are needed, got {values}")
    values = values.double()
    concepts, seeds = values.shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(concepts, (resamples, concepts, 1), generator=generator)
    within = torch.randint(seeds, (resamples, concepts, seeds), generator=generator)
    means = values[chosen, within].mean((1, 2))
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, edges).tolist()
    return Interval(values.mean().item(), low, high)
