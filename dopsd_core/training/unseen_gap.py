"""The gap on the unseen prompt over a run: its smallest value, a plateau, overfitting. Functions of step reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from .log import StepReport

UNTRAINED = 1.0
"""The gap of the untouched model, by definition."""

NO_BETTER = "no step is better than the untouched model, whose gap is 1: lower lr, and train again"
"""Where every measured gap is at least 1."""

_PROGRESS = 0.99
"""A gap counts as smaller than before below this share of it."""

_RISE, _RISEN = 1.05, 3
"""Overfitting: so much larger than the smallest gap, in so many measurements in a row."""


@dataclass(frozen=True)
class BestStep:
    """The step with the smallest gap on the unseen prompt.

    Attributes:
        step: optimizer steps done.
        gap: relative gap of the unseen prompt after it; 1 is before training.
        path: the LoRA file of this step; None if it is not kept.
    """

    step: int
    gap: float
    path: Path | None = None

    @property
    def is_better(self) -> bool:
        """Whether the model is better after it than untouched."""
        return self.gap < UNTRAINED

    def sentence(self, last: int, file: str, hint: str) -> str:
        """For the end of a run; "" where it is the last step without a file of its own.

        Args:
            last: the run's last step.
            file: how `path` is written; "" for None.
            hint: how to keep such files.
        """
        found = f"smallest gap on the unseen prompt: {self.gap:.3f} at step {self.step}"
        if not self.is_better:
            return f"{found}; {NO_BETTER}"
        if self.path is None and self.step == last:
            return ""
        return f"{found}; {file or f'no LoRA of that step is kept: {hint}'}"


def measured(reports: Sequence[StepReport], after: int = 0) -> list[tuple[int, float]]:
    """(step, relative gap of the unseen prompt) of the steps after `after` in which it was measured."""
    return [
        (report.step, report.heldout_relative_gap)
        for report in reports
        if report.step > after and report.heldout_relative_gap is not None
    ]


def best_step(
    reports: Sequence[StepReport], among: Collection[int] | None = None, after: int = 0
) -> tuple[int, float] | None:
    """(step, gap) of the smallest gap on the unseen prompt, the first one of equals; None if there is none.

    Args:
        reports: in the order of their steps.
        among: only these steps; None for all.
        after: only steps after this one; earlier gaps are of another unseen prompt.
    """
    found = [(step, gap) for step, gap in measured(reports, after) if among is None or step in among]
    return min(found, key=lambda point: point[1], default=None)


def is_plateau(reports: Sequence[StepReport], patience: int, after: int = 0, warmup: int = 0) -> bool:
    """Whether the last `patience` measurements are not smaller, by 1 % or more, than the smallest before them.

    Args:
        reports: in the order of their steps.
        patience: at least 1; 0 for never.
        after: as for `best_step`.
        warmup: steps with a smaller learning rate; measurements in them do not count among the last.
    """
    smallest, waited = UNTRAINED, 0
    for step, gap in measured(reports, after):
        if gap < smallest * _PROGRESS:
            smallest, waited = gap, 0
        elif step > warmup:
            waited += 1
    return 0 < patience <= waited


def overfitting_since(reports: Sequence[StepReport], after: int = 0) -> int | None:
    """The step since which the gap on the unseen prompt rises while that on the training images falls; None if not.

    Both count in three measurements in a row: the unseen gap at least 5 % above its smallest value, the trained one
    below its value at that step.
    """
    best = best_step(reports, after=after)
    if best is None:
        return None
    step, smallest = best
    points = [report for report in reports if report.step >= step and report.heldout_relative_gap is not None]
    trained, recent = points[0].relative_gap, points[1:][-_RISEN:]
    if trained is None or len(recent) < _RISEN:
        return None
    has_risen = all((report.heldout_relative_gap or 0) >= smallest * _RISE for report in recent)
    falls = all(report.relative_gap is not None and report.relative_gap < trained for report in recent)
    return step if has_risen and falls else None
