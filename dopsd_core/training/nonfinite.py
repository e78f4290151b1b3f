"""The error for values that are not finite, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

WIDER_DTYPE = "load the model in bf16 or fp32 (in ComfyUI the node ModelComputeDtype sets it)"
LOWER_RATE = "lower lr, or raise warmup; on half precision load the model in a wider dtype"


class NonFiniteError(RuntimeError):
    """Raised if a loss, gradient or gap is not finite.

    Args:
        step: the optimizer step that was being computed, from 1.
        what: name of the value.
        value: the value.
        cause: the first prediction that was not finite, if known.
        remedy: what to do, without a full stop.

    Attributes:
        step: the optimizer step that was being computed, from 1.
    """

    def __init__(self, step: int, what: str, value: float, cause: str = "", remedy: str = LOWER_RATE) -> None:
        because = f" (not finite: {cause})" if cause else ""
        super().__init__(f"the {what} of step {step} is {value}{because}; the state before it is kept: {remedy}")
        self.step, self._facts = step, (step, what, value, cause, remedy)

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[int, str, float, str, str]]:
        return NonFiniteError, self._facts  # so that it can be pickled by a worker process


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of the tensors, of any shape, is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def remedy(step: int, scales_losses: bool) -> str:
    """What to do about a non-finite value after `step` optimizer steps.

    scales_losses: whether the network computes in fp16.
    """
    if scales_losses:
        return f"the network overflows in fp16; {WIDER_DTYPE}"
    return LOWER_RATE if step else f"nothing is trained yet, so the cause is the model or its dtype; {WIDER_DTYPE}"
