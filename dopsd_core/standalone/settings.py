"""Training settings of the standalone host for real models."""

from __future__ import annotations

from ..config import TrainConfig
from ..families import get_family
from ..presets import USUAL, preset_config


def family_config(family: str, preset: str = USUAL) -> TrainConfig:
    """The defaults of `train` for a family: those of a preset, by its name in `presets.PRESETS`."""
    return preset_config(preset, get_family(family))
