"""The interface of optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ..lazy import lazy
from ..options import Hint, Variant

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


class Optimizer(Variant):
    """Options of an optimizer, from which it is built."""

    bytes_per_parameter: ClassVar[int]
    """Size of its state per parameter in bytes, for the memory estimate."""

    needs_matrices: ClassVar[bool] = False
    """Whether it trains matrices only, as adapters have them; a network has vectors too."""

    takes_parts: ClassVar[bool] = False
    """Whether it works on parameters of which each process holds a part."""

    lr: Annotated[float, Hint(step=1e-6)] = Field(
        default=1e-4,
        gt=0,
        le=0.1,
        description="learning rate after warm-up; the paper uses 1e-4, and 2e-5 for FLUX.2-klein",
    )

    def require_packages(self) -> None:
        """Checks that what the optimizer needs is installed, before any work on the device.

        Raises:
            ConfigError: a required package is missing, or too old.
        """

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Builds the torch optimizer on the parameters, of any shape.

        `state_dict` must contain its entire state. A schedule-free optimizer has `train` and `eval`, see `evaluating`.

        Raises:
            ConfigError: a required package is not installed.
        """
        raise NotImplementedError

    def saved_bytes(self, parameters: int, tensors: int) -> int:
        """Maximum size in bytes of the state in a checkpoint, for this many parameters in this many tensors."""
        return self.bytes_per_parameter * parameters

    def leaner(self) -> Optimizer | None:
        """An equivalent optimizer that needs less memory, if there is one."""
        return None


def start_training(optimizer: torch.optim.Optimizer) -> None:
    """Switches a schedule-free optimizer to training mode; does nothing for others."""
    switch: Any = optimizer
    if callable(getattr(switch, "train", None)):
        switch.train()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives all parameter groups a learning rate; where it is a tensor, as in torchao's optimizers, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the `with` block, the parameters are those for evaluation; on exit, those for training.

    A schedule-free optimizer has different weights for training and evaluation and switches between them with `eval()`
    and `train()`, which rounds; so the weights for training are kept, and a run that was saved more often is the same.
    Does nothing for others.
    """
    switch: Any = optimizer
    if not callable(getattr(switch, "eval", None)):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    switch.eval()
    _mark_changed(optimizer)
    try:
        yield
    finally:
        switch.train()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)
        _mark_changed(optimizer)


def _mark_changed(optimizer: torch.optim.Optimizer) -> None:
    """Counts a change of the parameters, which an optimizer that writes to their `data` does not."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.autograd.graph.increment_version(parameter)
