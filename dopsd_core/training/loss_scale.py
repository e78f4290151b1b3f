"""Loss scaling for networks that compute in fp16.

The gradient of a mean over a latent of n elements starts at 2 * error / n, about 1e-6 at 1024 pixels, and becomes
smaller in the layers below. fp16 has no numbers between 0 and 6e-8, so much of the gradient would silently underflow.
The loss is therefore multiplied by a power of two before each backward, and the fp32 gradients of the LoRA are divided
by it after the last one. If a gradient overflows, the step is repeated with half the scale.

This is the rule of `torch.amp.GradScaler` (tested for parity), with the scale on the host: the trainer reads the
gradient norm anyway, which is finite exactly if nothing overflowed, so there is no additional synchronization, and it
works on devices that GradScaler does not support.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH_INTERVAL = 200
"""Steps without overflow before the scale is doubled: gradients shrink as the student approaches its teacher."""
LARGEST = 2.0**32
SMALLEST = 1.0


class LossScale:
    """The scale of the losses; constantly 1 unless the network computes in fp16.

    Attributes:
        value: the scale, a power of two, so that multiplication and division are exact.
        good_steps: optimizer steps since its last change.
    """

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.is_on = compute_dtype == torch.float16
        self.value = INITIAL if self.is_on else 1.0
        self.good_steps = 0

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divides gradients, of any shape, by the scale in place."""
        if self.is_on and (tensors := list(gradients)):
            torch._foreach_mul_(tensors, 1.0 / self.value)  # pyright: ignore[reportPrivateImportUsage]

    def after_step(self) -> None:
        """Doubles the scale after `GROWTH_INTERVAL` consecutive optimizer steps without overflow."""
        if not self.is_on:
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = min(2.0 * self.value, LARGEST), 0

    def after_overflow(self) -> bool:
        """Halves the scale after an overflow; returns False if there is no scaling or the scale is minimal."""
        if not self.is_on or self.value <= SMALLEST:
            return False
        self.value, self.good_steps = self.value / 2.0, 0
        return True

    def state(self) -> tuple[float, int] | None:
        """(value, good_steps) for a checkpoint; None without scaling."""
        return (self.value, self.good_steps) if self.is_on else None

    def load(self, state: tuple[float, int] | None) -> None:
        """Loads what `state` returned; None, from a run without scaling, keeps the initial scale."""
        if self.is_on and state is not None:
            self.value, self.good_steps = float(state[0]), int(state[1])
