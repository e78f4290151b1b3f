"""The untouched network."""

from __future__ import annotations

from typing import ClassVar, Literal

from .base import Teacher


class FrozenTeacher(Teacher):
    """The untouched network: needs no second set of weights, and the target does not change."""

    name: ClassVar[str] = "frozen"
    summary: ClassVar[str] = "the untouched network, which saves memory"
    weights: ClassVar[Literal["copy", "base", "student"]] = "base"
