"""torch's AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from .base import Optimizer

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


class AdamW(Optimizer):
    """torch's AdamW."""

    name: ClassVar[str] = "adamw"
    summary: ClassVar[str] = "torch's AdamW"
    bytes_per_parameter: ClassVar[int] = 8  # two moments in fp32
    takes_parts: ClassVar[bool] = True

    weight_decay: Annotated[float, Hint(step=1e-3, most=1.0)] = Field(
        default=0.0, ge=0, description="decoupled weight decay"
    )

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """torch's AdamW on the parameters, of any shape."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def leaner(self) -> Optimizer | None:
        """AdamW with 8-bit moments."""
        from .adamw8bit import AdamW8bit

        return AdamW8bit(lr=self.lr, weight_decay=self.weight_decay)
