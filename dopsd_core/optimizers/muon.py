"""Muon (orthogonalized momentum, arXiv 2502.16982), from torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ..lazy import lazy
from ..options import ConfigError, Hint
from .adamw import AdamW

if TYPE_CHECKING:
    import torch

    from .base import Optimizer
else:
    torch = lazy("torch")


class Muon(AdamW):
    """torch's Muon, with steps scaled to those of AdamW; the parameters of all adapters are matrices."""

    name: ClassVar[str] = "muon"
    summary: ClassVar[str] = "orthogonalized momentum, scaled so that AdamW's learning rate fits; requires torch 2.9"
    bytes_per_parameter: ClassVar[int] = 4  # momentum in fp32
    takes_parts: ClassVar[bool] = False
    needs_matrices: ClassVar[bool] = True

    muon_momentum: Annotated[float, Hint(step=0.01, most=0.999)] = Field(
        default=0.95, ge=0, lt=1, description="share of the previous momentum that is kept"
    )

    def require_packages(self) -> None:
        """Raises ConfigError if torch is older than 2.9."""
        _muon()

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """torch's Muon on the parameters, all of shape [rows, columns].

        The As of a fused projection are one matrix, [parts * rank, in], and are orthogonalized together.

        Raises:
            ConfigError: torch has no Muon.
        """
        return _muon()(
            parameters,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    def leaner(self) -> Optimizer | None:
        """None."""
        return None


def _muon() -> Any:
    found = getattr(torch.optim, "Muon", None)
    if found is None:
        here = torch.version.__version__  # the lazy module has no __version__ of its own
        raise ConfigError((f"optimizer muon needs torch 2.9, this is {here}; update torch, or set optimizer to adamw",))
    return found
