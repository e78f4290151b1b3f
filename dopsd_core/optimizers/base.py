"""What an optimizer is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ..options import Hint, Variant

if TYPE_CHECKING:
    import torch


class Optimizer(Variant):
    """How gradients become steps."""

    bytes_per_parameter: ClassVar[int]
    """What it keeps for each parameter, for the estimate of memory."""

    lr: Annotated[float, Hint(step=1e-6)] = Field(
        default=1e-4, gt=0, le=0.1, description="learning rate after warm-up; the paper: 1e-4, for FLUX.2-klein 2e-5"
    )

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over the parameters; its `state_dict` is all of its state. One that averages its weights
        (schedule-free) has `train` and `eval`, see `evaluating`.

        Raises:
            ConfigError: what it needs is not installed.
        """
        raise NotImplementedError

    def saved_bytes(self, parameters: int, tensors: int) -> int:
        """What its state takes in a checkpoint at most, of so many parameters in so many tensors."""
        return self.bytes_per_parameter * parameters

    def leaner(self) -> Optimizer | None:
        """The one that does the same with less memory, if there is one."""
        return None


def start_training(optimizer: torch.optim.Optimizer) -> None:
    """Tells a schedule-free optimizer, once, that training begins; every other one has no such switch."""
    switch: Any = optimizer
    if callable(getattr(switch, "train", None)):
        switch.train()


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the `with`, the parameters are those to sample with; after it, those to train on.

    A schedule-free optimizer trains on other weights than it is judged by and switches between them with `eval()` and
    `train()`; with every other one nothing happens.
    """
    switch: Any = optimizer
    if not callable(getattr(switch, "eval", None)):
        yield
        return
    switch.eval()
    try:
        yield
    finally:
        switch.train()
