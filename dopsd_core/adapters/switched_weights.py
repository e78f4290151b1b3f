"""What all trainable weights share: the switch between student, teacher and the untouched network, and their states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from torch import Tensor

from ..teachers import TEACHERS, Teacher
from ..trainable import Mode, Role

if TYPE_CHECKING:
    from typing_extensions import Self


class SwitchedWeights(ABC):
    """Weights of student and teacher on one network, of which a forward uses those of the current mode."""

    is_sharded: ClassVar[bool] = False
    """Whether each rank holds a part of the weights, so that all ranks run the network and read states together."""

    def __init__(self, teacher: Teacher | str) -> None:
        """teacher: whose weights teach; a name selects that choice with its defaults."""
        self.teacher: Teacher = TEACHERS.validated(teacher)
        self._mode: Mode = "student"

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher has weights of its own."""
        return self.teacher.weights == "copy"

    # -- attaching ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def attach(self) -> None:
        """Lets the network compute with these weights."""

    @abstractmethod
    def detach(self) -> None:
        """Restores the network; does nothing if not attached."""

    @contextmanager
    def attached(self) -> Iterator[Self]:
        """Attaches inside the `with` block and detaches on exit, also after an exception."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    # -- student, teacher, off ----------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """Whose weights the next forward uses: "student" (the default), "teacher" or "off"."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        """Raises ValueError if the mode is unknown."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
        self._switch(mode)

    @contextmanager
    def use(self, mode: Mode) -> Iterator[None]:
        """Uses the given mode inside the `with` block and restores the previous one on exit. Copies nothing."""
        previous = self._mode
        self.mode = mode
        try:
            yield
        except BaseException:
            self._switch_back(previous)
            raise
        self.mode = previous

    def _switch(self, mode: Mode) -> None:
        self._mode = mode

    def _switch_back(self, mode: Mode) -> None:
        """Restores a mode after an error."""
        self._switch(mode)

    # -- states -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _views(self, which: Role) -> dict[str, Tensor]:
        """The tensors of a role by name, of any shape; empty for a teacher without weights of its own."""

    @torch.no_grad()
    def _load(self, which: Role, tensors: Mapping[str, Tensor], misfit: str, derived: tuple[str, ...] = ()) -> None:
        """Copies tensors of any shape into the views; misfit, derived: the error's start, name endings to ignore.

        Raises:
            ValueError: names are missing or unexpected, or a shape differs; nothing is loaded.
        """
        views = self._views(checked_role(which))
        missing = sorted(views.keys() - tensors.keys())
        unexpected = sorted(key for key in tensors.keys() - views.keys() if not key.endswith(derived))
        if missing or unexpected:
            raise ValueError(
                f"{misfit}: {len(missing)} missing {missing[:4]}, {len(unexpected)} unexpected {unexpected[:4]}"
            )
        for name, view in views.items():
            if view.shape != tensors[name].shape:
                raise ValueError(f"{name}: expected shape {tuple(view.shape)}, got {tuple(tensors[name].shape)}")
        for name, view in views.items():
            view.copy_(tensors[name])


class ExchangedWeights(SwitchedWeights):
    """Weights of the network itself: those of the current mode are in its modules while it is attached."""

    def __init__(self, teacher: Teacher | str) -> None:
        """teacher: whose weights teach; a name selects that choice with its defaults."""
        super().__init__(teacher)
        self._is_attached = False

    @property
    def is_attached(self) -> bool:
        """Whether the network currently computes with these weights."""
        return self._is_attached

    def attach(self) -> None:
        """Lets the network compute with these weights.

        Raises:
            RuntimeError: these or other weights are already attached; nothing is changed.
        """
        self._require_original()
        self._is_attached = True
        self._show(self._mode)

    def detach(self) -> None:
        """Puts the original weights back; does nothing if not attached."""
        if self._is_attached:
            self._show("off")
            self._is_attached = False

    def _switch(self, mode: Mode) -> None:
        if self._is_attached and mode != self._mode:
            self._show(mode)
        super()._switch(mode)

    @abstractmethod
    def _require_original(self) -> None:
        """Raises RuntimeError if the network does not compute with its original weights."""

    @abstractmethod
    def _show(self, mode: Mode) -> None:
        """Puts the weights of the mode into the network's modules."""


def checked_role(which: Role) -> Role:
    """The role itself.

    Raises:
        ValueError: it is unknown.
    """
    if which not in get_args(Role):
        raise ValueError(f"which must be one of {', '.join(get_args(Role))}; got {which!r}")
    return which
