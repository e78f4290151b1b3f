"""Running means of the loss at each rollout step, by which an objective may draw its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..objectives import ObjectiveOutput

_KEPT = 0.9
"""How much of the mean is kept when another batch is added."""


class StepLosses:
    """Means over the training batches so far, on every rank the same; prior anchors have another target."""

    def __init__(self, num_steps: int) -> None:
        """num_steps: K."""
        self._means: list[float | None] = [None] * num_steps

    @property
    def known(self) -> tuple[float, ...]:
        """The mean at each of the K steps; empty until each has been measured."""
        return tuple(mean for mean in self._means if mean is not None) if None not in self._means else ()

    def add(self, outputs: Sequence[ObjectiveOutput]) -> None:
        """Adds the batches of a finished optimizer step, in their order."""
        for step in (step for output in outputs if not output.is_anchor for step in output.steps):
            if step.index < len(self._means):
                before = self._means[step.index]
                self._means[step.index] = step.loss if before is None else before + (1 - _KEPT) * (step.loss - before)

    def state(self) -> list[float | None]:
        """For a checkpoint."""
        return list(self._means)

    def load(self, state: Sequence[Any] | None) -> None:
        """Loads what `state` returned; None, from an older checkpoint, changes nothing."""
        if state is not None and len(state) == len(self._means):
            self._means = list(state)
