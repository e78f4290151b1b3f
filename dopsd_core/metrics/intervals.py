"""Bootstrap intervals of means: over prompts (a report card), or over concepts and their seeds (a comparison)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.rng import make_generator

RESAMPLES, NESTED_RESAMPLES = 2000, 10_000
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
        count: how many values it is over.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the interval: only then a difference counts as one; rounding does not."""
        return self.low > _ROUNDING or self.high < -_ROUNDING


def bootstrap(
    values: Sequence[float],
    groups: Sequence[object] = (),
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap of the mean of values, for example of differences per prompt. NaN values are left out.

    Args:
        values: one per prompt.
        groups: the group of each value, such as its concept: whole groups are resampled, and their values are kept
            together. By default each value is its own group.
        level: share of the resampled means inside the interval, in 0..1.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: there are no values, or not one group per value.
    """
    if groups and len(groups) != len(values):
        raise ValueError(f"there are {len(values)} values and {len(groups)} groups; give one group per value")
    known = [
        (value, group) for value, group in zip(values, groups or range(len(values)), strict=True) if value == value
    ]
    if not known:
        raise ValueError("there are no values to average")
    members: dict[object, list[float]] = {}
    for value, group in known:
        members.setdefault(group, []).append(value)
    sums = torch.tensor([sum(part) for part in members.values()], dtype=torch.float64)
    sizes = torch.tensor([len(part) for part in members.values()], dtype=torch.float64)
    draw = torch.randint(len(members), (resamples, len(members)), generator=make_generator(seed, "bootstrap"))
    means = sums[draw].sum(1) / sizes[draw].sum(1)
    return _interval(float(sums.sum() / sizes.sum()), means, level, len(known))


def nested_bootstrap(
    values: Tensor, *, level: float = 0.95, seed: int = 0, resamples: int = NESTED_RESAMPLES
) -> Interval:
    """Percentile bootstrap of the mean of values [concepts, seeds], for example of differences between two methods.

    Concepts are resampled, and within each its seeds: the few seeds of one concept are no independent evidence for
    others.

    Args:
        values: finite.
        level: share of the resampled means inside the interval, in 0..1.
        seed: of the resampling.

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
    return _interval(values.mean().item(), values[chosen, within].mean((1, 2)), level, values.numel())


def paired_difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    groups: Sequence[object] = (),
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of ours - theirs over the same prompts and the same noise, with its interval; arguments as in
    `bootstrap`.

    Raises:
        ValueError: the two are not of equal length, or empty.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"there are {len(ours)} and {len(theirs)} values; a pair needs one of each")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return bootstrap(differences, groups, level=level, seed=seed, resamples=resamples)


def _interval(mean: float, means: Tensor, level: float, count: int) -> Interval:
    """From the resampled means [resamples], float64."""
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, edges).tolist()
    return Interval(mean, low, high, count)
