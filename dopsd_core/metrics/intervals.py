"""Paired bootstrap: the mean difference of two variants over the same prompts, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..training.rng import make_generator

RESAMPLES = 2000


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
    def leaves_zero(self) -> bool:
        """Whether zero is outside the interval: only then a difference counts as one."""
        return self.low > 0 or self.high < 0


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
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, edges).tolist()
    return Interval(float(sums.sum() / sizes.sum()), low, high, len(known))


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
