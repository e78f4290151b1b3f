"""Prodigy (arXiv 2306.06101), which estimates the learning rate, from prodigyopt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ..options import ConfigError, Hint
from .base import Optimizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger("dopsd")

_USUAL_LR = 0.1  # below it, the estimate is mostly cancelled


class Prodigy(Optimizer):
    """Prodigy; requires the package prodigyopt. Its own learning rate, a factor of the estimate, is 1."""

    name: ClassVar[str] = "prodigy"
    summary: ClassVar[str] = (
        "finds the learning rate; leave prodigy_lr at 1, lr has no effect; requires the package prodigyopt"
    )
    prefix: ClassVar[str] = "prodigy_"
    bytes_per_parameter: ClassVar[int] = 16  # two moments, the initial weights and the sum of gradients in fp32

    lr: Annotated[float, Hint(step=0.1)] = Field(
        default=1.0, gt=0, le=10, description="factor of the learning rate that Prodigy estimates; leave it at 1"
    )
    weight_decay: Annotated[float, Hint(step=1e-3, most=1.0)] = Field(
        default=0.0, ge=0, description="decoupled weight decay, times the estimated learning rate"
    )
    d_coef: Annotated[float, Hint(step=0.1)] = Field(
        default=1.0, gt=0, le=10, description="factor of Prodigy's estimate; 0.5 for smaller steps, 2 for larger ones"
    )
    safeguard_warmup: bool = Field(
        default=True, description="keeps a learning rate warm-up from inflating the estimate; no effect without warm-up"
    )

    def require_packages(self) -> None:
        """Raises ConfigError if prodigyopt cannot be imported."""
        _prodigy()

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """prodigyopt's Prodigy, with bias correction, on the parameters, of any shape.

        Raises:
            ConfigError: prodigyopt cannot be imported.
        """
        if self.lr < _USUAL_LR:
            log.warning("prodigy_lr is %g; Prodigy estimates the learning rate and needs 1 here", self.lr)
        return _prodigy()(
            parameters,
            lr=self.lr,
            weight_decay=self.weight_decay,
            d_coef=self.d_coef,
            use_bias_correction=True,
            safeguard_warmup=self.safeguard_warmup,
        )


def _prodigy() -> Any:
    try:
        from prodigyopt import Prodigy as Imported  # type: ignore[import-not-found]
    except Exception as error:  # a broken installation can fail in any way
        raise ConfigError(
            (f"optimizer prodigy needs prodigyopt ({error}); pip install prodigyopt, or set optimizer to adamw",)
        ) from error
    return Imported
