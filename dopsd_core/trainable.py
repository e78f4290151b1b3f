"""The interface of trainable weights: adapters on a frozen network, or the network's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Mode = Literal["student", "teacher", "off"]
"""The weights that a forward uses: the student's, the teacher's, or those of the untouched network."""

Role = Literal["student", "teacher"]
"""Roles that have their own weights."""


class Trainable(Protocol):
    """The weights of student and teacher, and the switch between them and the untouched network.

    Attributes:
        is_sharded: whether each rank holds a part of the weights, so that all ranks run the network and read states
            together.
    """

    is_sharded: ClassVar[bool]

    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters for the optimizer, fp32, always the same objects in the same order."""
        ...

    def state(self, which: Role = "student") -> dict[str, Tensor]:
        """Copies on the CPU, fp32, by name, in the parameters' shapes; empty for a teacher without its own weights."""
        ...

    def load_state(self, which: Role, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned.

        Raises:
            ValueError: names or shapes differ from those of `state`; nothing is loaded.
        """
        ...

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher has its own weights."""
        ...

    def use(self, mode: Mode) -> AbstractContextManager[Any]:
        """Uses the given mode inside the `with` block and restores the previous one on exit."""
        ...

    def update_teacher(self) -> None:
        """Updates the teacher after each optimizer step."""
        ...

    def attached(self) -> AbstractContextManager[Any]:
        """Attaches these weights to the network inside the `with` block and restores it on exit."""
        ...
