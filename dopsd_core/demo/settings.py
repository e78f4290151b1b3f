"""Training settings of the demo."""

from __future__ import annotations

from ..adapters import Lora
from ..config import TrainConfig
from ..optimizers import AdamW, Constant
from ..teachers import EmaTeacher

SAMPLE_STEPS = 2
"""Sampling steps that the demo model was distilled to."""


def demo_config(steps: int = 60, seed: int = 0) -> TrainConfig:
    """The settings of the demo's D-OPSD run, also the defaults of `train --model demo`."""
    return TrainConfig(
        family="z_image",
        steps=steps,
        batch_size=4,
        rollout_steps=SAMPLE_STEPS,
        seed=seed,
        checkpoint_every=50,
        probe_every=10,
        adapter=Lora(rank=16, alpha=16.0),
        optimizer=AdamW(lr=2e-3),
        schedule=Constant(warmup=10),
        teacher=EmaTeacher(decay=0.999),
    )
