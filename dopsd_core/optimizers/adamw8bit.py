"""AdamW with 8-bit moments (arXiv 2110.02861), from bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..options import ConfigError
from .adamw import AdamW

if TYPE_CHECKING:
    import torch

    from .base import Optimizer


_TABLES = 2**16  # bytes per tensor


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments; requires the package bitsandbytes and an NVIDIA GPU."""

    name: ClassVar[str] = "adamw8bit"
    summary: ClassVar[str] = "AdamW with 8-bit moments; requires the package bitsandbytes and an NVIDIA GPU"
    bytes_per_parameter: ClassVar[int] = 2
    takes_parts: ClassVar[bool] = False

    def require_packages(self) -> None:
        """Raises ConfigError if bitsandbytes cannot be imported."""
        _adamw8bit()

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """bitsandbytes' AdamW8bit on the parameters, of any shape.

        Raises:
            ConfigError: bitsandbytes cannot be imported.
        """
        return _adamw8bit()(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def saved_bytes(self, parameters: int, tensors: int) -> int:
        """Small tensors stay in 32 bits; each of the others has additional tables."""
        return 3 * parameters + _TABLES * tensors

    def leaner(self) -> Optimizer | None:
        """None."""
        return None


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit as Imported  # type: ignore[import-not-found]
    except Exception as error:  # bitsandbytes fails in its own ways where its CUDA library is missing
        raise ConfigError(
            (f"optimizer adamw8bit needs bitsandbytes ({error}); install it, or set optimizer to adamw",)
        ) from error
    return Imported
