"""The initial weights of a run, from a LORA_MODEL."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...dopsd_core.config import TrainConfig
from ...dopsd_core.training import start
from ...dopsd_core.training.start import Start
from .denoiser import ComfyDenoiser

__all__ = ["Start", "start_of"]


def start_of(
    lora: Mapping[str, Tensor] | None,
    denoiser: ComfyDenoiser,
    config: TrainConfig,
    trigger: str = "",
    base_model: str = "",
) -> Start:
    """The initial weights from a LORA_MODEL of any trainer; arguments and errors as in the core's.

    lora: tensors by name, such as lora_A [rank, in] and lora_B [out, rank]; None for no LoRA.
    """
    return start.start_of(lora, getattr(lora, "facts", {}), denoiser.sites(), config, trigger, base_model)
