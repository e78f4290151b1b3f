"""Optimizers, one per module. A new one is a module here and an entry in `OPTIMIZERS`."""

from __future__ import annotations

from ..options import Registry
from .adamw import AdamW
from .adamw8bit import AdamW8bit
from .base import Optimizer, evaluating, start_training
from .schedules import SCHEDULES, Constant, Cosine, Schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamW",
    "AdamW8bit",
    "Constant",
    "Cosine",
    "Optimizer",
    "Schedule",
    "evaluating",
    "start_training",
]

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", AdamW, AdamW8bit)
