"""What a run asks of the weights that it trains: adapters over a frozen network today, its own weights one day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Mode = Literal["student", "teacher", "off"]
"""Whose weights a forward uses: the trained ones, the teacher's, or the untouched network's."""

Role = Literal["student", "teacher"]
"""Who has weights of its own."""


class Trainable(Protocol):
    """A student that learns, its teacher, and the switch between them and the untouched network."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """What the optimizer gets, fp32, always the same objects in the same order."""
        ...

    def state(self, which: Role = "student") -> dict[str, Tensor]:
        """Copies on the CPU, fp32, by name; empty for a teacher without weights of its own."""
        ...

    def load_state(self, which: Role, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            ValueError: the tensors are not those of `state`; nothing has been loaded then.
        """
        ...

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher has weights of its own."""
        ...

    def use(self, mode: Mode) -> AbstractContextManager[Any]:
        """The given mode inside the `with`, the previous one after it."""
        ...

    def update_teacher(self) -> None:
        """Lets the teacher follow the student, after each optimizer step."""
        ...

    def attached(self) -> AbstractContextManager[Any]:
        """Inside the `with`, the network runs through these weights; after it, as it was."""
        ...
