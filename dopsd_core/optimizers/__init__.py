"""Optimizers, one per module. A new one is a module here and an entry in `OPTIMIZERS`."""

from __future__ import annotations

from ..options import Registry
from .adafactor import Adafactor
from .adamw import AdamW
from .adamw8bit import AdamW8bit
from .base import Optimizer, evaluating, set_rate, start_training
from .custom import Custom
from .muon import Muon
from .prodigy import Prodigy
from .schedules import SCHEDULES, Constant, Cosine, Schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "Constant",
    "Cosine",
    "Custom",
    "Muon",
    "Optimizer",
    "Prodigy",
    "Schedule",
    "evaluating",
    "set_rate",
    "start_training",
]

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", AdamW, AdamW8bit, Adafactor, Muon, Prodigy, Custom)
