"""What a teacher's weights are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ..options import Variant

if TYPE_CHECKING:
    from torch import Tensor


class Teacher(Variant):
    """Whose weights predict what the student learns."""

    weights: ClassVar[Literal["copy", "base", "student"]]
    """A second set of trained weights, those of the untouched network, or the student's own."""

    def update(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        """Changes the second set in place after an optimizer step; called where `weights` is "copy".

        teacher, student: fp32 tensors of equal shapes, in the same order; no graph.
        """
