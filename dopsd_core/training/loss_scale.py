"""Loss scaling, for networks that compute in fp16.

The gradient of a mean over a latent of n elements starts at 2 * error / n: about 1e-6 at 1024 pixels, and the layers
below divide it further. fp16 has no numbers between 0 and 6e-8, so much of the gradient would become zero without a
word. The loss is therefore multiplied by a power of two before each backward, and the fp32 gradients of the LoRA are
divided by it after the last one. Where a gradient overflows instead, the step is repeated with half the scale.

This is the rule of `torch.amp.GradScaler` (a test holds it to that), with the scale on the host: the trainer reads the
gradient's norm anyway, which is finite exactly if nothing overflowed, so it costs no further synchronisation, and works
on devices that GradScaler does not know.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH_INTERVAL = 200
"""Steps without overflow after which the scale is doubled: gradients shrink while the student nears its teacher."""
LARGEST = 2.0**32
SMALLEST = 1.0


class LossScale:
    """What losses are multiplied by. Fixed at 1, and without any effect, unless the network computes in fp16.

    Attributes:
        value: the scale, a power of two, so that multiplying and dividing by it are exact.
        good_steps: optimizer steps since it last changed.
    """

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.is_on = compute_dtype == torch.float16
        self.value = INITIAL if self.is_on else 1.0
        self.good_steps = 0

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divides the gradients by the scale, in place."""
        if self.is_on and (tensors := list(gradients)):
            torch._foreach_mul_(tensors, 1.0 / self.value)  # pyright: ignore[reportPrivateImportUsage]

    def after_step(self) -> None:
        """An optimizer step was made: doubles the scale once `GROWTH_INTERVAL` of them followed one another."""
        if not self.is_on:
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = min(2.0 * self.value, LARGEST), 0

    def after_overflow(self) -> bool:
        """A gradient was not finite: halves the scale. False where that cannot help: no scaling, or none left."""
        if not self.is_on or self.value <= SMALLEST:
            return False
        self.value, self.good_steps = self.value / 2.0, 0
        return True

    def state(self) -> tuple[float, int] | None:
        """(value, good_steps) for a checkpoint; None where losses are not scaled."""
        return (self.value, self.good_steps) if self.is_on else None

    def load(self, state: tuple[float, int] | None) -> None:
        """The inverse of `state`; None, from a run that did not scale, leaves the initial scale."""
        if self.is_on and state is not None:
            self.value, self.good_steps = float(state[0]), int(state[1])
