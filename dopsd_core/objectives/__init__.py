"""Training objectives."""

from __future__ import annotations

from .dopsd import (
    DOPSD,
    OBJECTIVES,
    SFT,
    LossForm,
    Objective,
    ObjectiveInputs,
    ObjectiveOutput,
    SigmaDistribution,
    StepStats,
    measure_gap,
    self_distillation_loss,
)

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
