"""Training objectives, one per module. A new one is a module here and an entry in `OBJECTIVES`."""

from __future__ import annotations

from ..options import Registry
from .base import Objective, ObjectiveInputs, ObjectiveOutput, StepStats
from .dopsd import DOPSD, LossForm, measure_gap, self_distillation_loss
from .sft import SFT, SigmaDistribution

__all__ = [
    "DOPSD",
    "OBJECTIVES",
    "SFT",
    "LossForm",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "SigmaDistribution",
    "StepStats",
    "measure_gap",
    "self_distillation_loss",
]

OBJECTIVES: Registry[Objective] = Registry("objective", DOPSD, SFT)
