"""Training settings of the standalone host for real models."""

from __future__ import annotations

from ..config import TrainConfig
from ..families import get_family
from ..optimizers import AdamW

RANK, STEPS = 32, 1000


def family_config(family: str, steps: int = STEPS) -> TrainConfig:
    """The defaults of `train` for a family: its own learning rate, rank 32, one image per step."""
    known = get_family(family)
    return TrainConfig(
        family=family, steps=steps, adapter=known.lora_config(RANK), optimizer=AdamW(lr=known.learning_rate)
    )
