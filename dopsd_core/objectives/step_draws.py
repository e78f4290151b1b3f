"""Which of the K rollout steps are backpropagated through, with weights that keep the gradient unbiased."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from ..lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

StepDraw = Literal["uniform", "gap"]
"""All steps with the same probability, or those more often at which the student is far from its target."""

_EVEN = 0.5
"""Share of the probability that is the same for all steps, so that no weight is above 1 / (_EVEN * count)."""


def every_step(num_steps: int) -> dict[int, float]:
    """All K steps, each with weight 1 / K."""
    return dict.fromkeys(range(num_steps), 1 / num_steps)


def draw_evenly(count: int, num_steps: int, generator: torch.Generator) -> dict[int, float]:
    """`count` different steps of K, each with weight 1 / count."""
    order = torch.randperm(num_steps, generator=generator)
    return dict.fromkeys(sorted(order[:count].tolist()), 1 / count)


def draw_by_gap(count: int, losses: Sequence[float], generator: torch.Generator) -> dict[int, float]:
    """`count` different steps of K, with weights 1 / (K * the step's probability).

    Systematic sampling: with one uniform number u, the steps in whose part of 0..count the numbers u, u + 1, ... lie.
    A step's part is as long as the probability that it is drawn.

    losses: mean loss of each of the K steps, a mean square; the gradient's size follows its root.
    """
    chances = inclusion(count, [max(loss, 0.0) ** 0.5 for loss in losses])
    ends = list(accumulate(chances))
    place = torch.rand((), generator=generator).item()
    drawn: dict[int, float] = {}
    for step, (end, chance) in enumerate(zip(ends, chances, strict=True)):
        is_last = step == len(chances) - 1 and len(drawn) < count  # where rounding made the sum smaller than count
        if place < end or is_last:
            drawn[step] = 1 / (len(chances) * chance)
            place += 1
    return drawn


def inclusion(count: int, sizes: Sequence[float]) -> list[float]:
    """The probability of each step, in (0, 1], with the sum `count`: partly even, partly in proportion to the sizes."""
    total, num_steps = sum(sizes), len(sizes)
    if total <= 0:
        return [count / num_steps] * num_steps
    shares = [_EVEN / num_steps + (1 - _EVEN) * size / total for size in sizes]
    certain: set[int] = set()
    while True:
        others = sum(share for step, share in enumerate(shares) if step not in certain)
        factor = (count - len(certain)) / others if others else 0.0
        above = {step for step, share in enumerate(shares) if step not in certain and share * factor >= 1}
        if not above:
            return [1.0 if step in certain else share * factor for step, share in enumerate(shares)]
        certain |= above


def weights_of(selected: Collection[int]) -> Mapping[int, float]:
    """The weight of each of the selected steps; without given weights the mean."""
    return selected if isinstance(selected, Mapping) else dict.fromkeys(selected, 1 / len(selected))
