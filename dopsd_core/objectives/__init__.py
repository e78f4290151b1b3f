"""Training objectives, one per module. A new one is a module here and an entry in `OBJECTIVES`."""

from __future__ import annotations

from ..options import Registry
from .base import ClassImage, Objective, ObjectiveInputs, ObjectiveOutput, StepStats
from .distillation import LossForm, measure_gap, self_distillation_loss
from .dopsd import DOPSD
from .dreambooth import DreamBooth
from .flow_matching import SigmaDistribution
from .pso import PSO
from .sft import SFT

__all__ = [
    "DOPSD",
    "OBJECTIVES",
    "PSO",
    "SFT",
    "ClassImage",
    "DreamBooth",
    "LossForm",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "SigmaDistribution",
    "StepStats",
    "measure_gap",
    "self_distillation_loss",
]

OBJECTIVES: Registry[Objective] = Registry("objective", DOPSD, SFT, DreamBooth, PSO)
