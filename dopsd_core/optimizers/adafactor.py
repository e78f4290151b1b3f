"""Adafactor (arXiv 1804.04235) with an external learning rate, from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..options import ConfigError
from .adamw import AdamW

if TYPE_CHECKING:
    import torch

    from .base import Optimizer


class Adafactor(AdamW):
    """Adafactor without momentum: row and column means of the squared gradient instead of Adam's moments."""

    name: ClassVar[str] = "adafactor"
    summary: ClassVar[str] = "almost no state, no momentum; use AdamW's learning rate or up to three times that"
    bytes_per_parameter: ClassVar[int] = 1  # one number per row and column: 4 / rank bytes
    takes_parts: ClassVar[bool] = False

    def require_packages(self) -> None:
        """Raises ConfigError if transformers cannot be imported."""
        _adafactor()

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """transformers' Adafactor with our schedule instead of its own, on the parameters, of any shape.

        Raises:
            ConfigError: transformers cannot be imported.
        """
        return _adafactor()(
            parameters, lr=self.lr, weight_decay=self.weight_decay, scale_parameter=False, relative_step=False
        )

    def saved_bytes(self, parameters: int, tensors: int) -> int:
        """A row or column mean is never larger than the matrix; at rank 1 both together are twice its size."""
        return 8 * parameters

    def leaner(self) -> Optimizer | None:
        """None."""
        return None


def _adafactor() -> Any:
    try:
        from transformers.optimization import Adafactor as Imported
    except Exception as error:  # a broken installation can fail in any way
        raise ConfigError(
            (f"optimizer adafactor needs transformers ({error}); update it, or set optimizer to adamw",)
        ) from error
    return Imported
