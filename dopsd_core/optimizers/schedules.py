"""Learning rate schedules: functions of the step only, so that a resumed run continues them.

A new one is a class here and an entry in `SCHEDULES`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from ..options import Hint, Registry, Variant


class Schedule(Variant):
    """A linear warm-up, followed by a factor that starts at 1."""

    warmup: Annotated[int, Hint(most=10_000)] = Field(
        default=0, ge=0, description="steps of linear warm-up of the learning rate"
    )

    def rate(self, lr: float, step: int, steps: int) -> float:
        """The learning rate of the optimizer step with index `step` (from 0) of `steps`, with base rate `lr`."""
        if step < self.warmup:
            return lr * (step + 1) / (self.warmup + 1)
        return lr * self.factor(min((step - self.warmup) / max(steps - self.warmup, 1), 1.0))

    def factor(self, progress: float) -> float:
        """The factor of the learning rate at `progress`, from 0 to 1, of the steps after warm-up."""
        raise NotImplementedError


class Constant(Schedule):
    """A constant learning rate after warm-up."""

    name: ClassVar[str] = "constant"
    summary: ClassVar[str] = "stays the same"

    def factor(self, progress: float) -> float:
        """Always 1."""
        return 1.0


class Cosine(Schedule):
    """Cosine decay of the learning rate to 0 at the last step."""

    name: ClassVar[str] = "cosine"
    summary: ClassVar[str] = "decays to 0 at the last step along a cosine"

    def factor(self, progress: float) -> float:
        """Half a cosine, from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: Registry[Schedule] = Registry("schedule", Constant, Cosine)
