"""The student's own weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from .base import Teacher


class SameTeacher(Teacher):
    """The student's own weights, without gradients."""

    name: ClassVar[str] = "same"
    summary: ClassVar[str] = "the student's own"
    weights: ClassVar[Literal["copy", "base", "student"]] = "student"
