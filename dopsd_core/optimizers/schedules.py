"""The course of the learning rate: a function of the step and of nothing else, so that a resumed run takes it up.

A new one is a class here and an entry in `SCHEDULES`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from ..options import Hint, Registry, Variant


class Schedule(Variant):
    """A linear warm-up, then a factor that falls from 1."""

    warmup: Annotated[int, Hint(most=10_000)] = Field(
        default=0, ge=0, description="steps over which the learning rate rises from 0"
    )

    def rate(self, lr: float, step: int, steps: int) -> float:
        """The rate of the optimizer step with index `step` (from 0) of `steps`, for a learning rate `lr`."""
        if step < self.warmup:
            return lr * (step + 1) / (self.warmup + 1)
        return lr * self.factor(min((step - self.warmup) / max(steps - self.warmup, 1), 1.0))

    def factor(self, progress: float) -> float:
        """What the rate is multiplied by when this share, within 0 and 1, of the steps after warm-up is done."""
        raise NotImplementedError


class Constant(Schedule):
    """The learning rate stays."""

    name: ClassVar[str] = "constant"
    summary: ClassVar[str] = "stays"

    def factor(self, progress: float) -> float:
        """1."""
        return 1.0


class Cosine(Schedule):
    """The learning rate falls to 0 at the last step, along half a cosine."""

    name: ClassVar[str] = "cosine"
    summary: ClassVar[str] = "falls to 0 at the last step along a cosine"

    def factor(self, progress: float) -> float:
        """From 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: Registry[Schedule] = Registry("schedule", Constant, Cosine)
