"""An exponential moving average of the student's weights (theta-bar in arXiv 2605.05204)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from .base import Teacher

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


class EmaTeacher(Teacher):
    """An exponential moving average (EMA) of the student's weights."""

    name: ClassVar[str] = "ema"
    summary: ClassVar[str] = "a moving average of the student's"
    prefix: ClassVar[str] = "ema_"
    weights: ClassVar[Literal["copy", "base", "student"]] = "copy"

    decay: Annotated[float, Hint(step=1e-4)] = Field(
        default=0.9999, ge=0, le=1, description="decay of the moving average per optimizer step"
    )

    def update(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        """theta_bar <- decay * theta_bar + (1 - decay) * theta, in fp32, for tensors of any shape."""
        torch._foreach_lerp_(teacher, student, 1.0 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
