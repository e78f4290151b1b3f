"""The interface of the choices for the teacher's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ..options import Variant

if TYPE_CHECKING:
    from torch import Tensor


class Teacher(Variant):
    """Which weights the teacher uses."""

    weights: ClassVar[Literal["copy", "base", "student"]]
    """A second set of weights, those of the untouched network, or the student's own."""

    def update(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        """Updates the second set in place after an optimizer step; called if `weights` is "copy".

        teacher, student: fp32 tensors with equal shapes in the same order, without graph.
        """
