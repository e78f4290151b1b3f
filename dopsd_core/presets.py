"""Presets: settings that fit together. There is one for each aim of a training, and some for other purposes.

What differs between aims is what was measured on the demo model to differ (`benchmarks/aims.py`, `benchmarks/edits.py`,
docs/results.md): fewer anchors learn more of a style or an edit, draw a subject better, and forget more, so all three
have anchors on half of the steps. What an aim expects of the dataset and of the teacher's view is in
`training/aims.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import TrainConfig
from .demo.settings import demo_config
from .families import Family
from .objectives.step_draws import StepDraw
from .options import changed, flattened


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that fit together. The fields are flat names of options.

    Attributes:
        steps: optimizer steps; 0 for the paper's number for the family.
        rank: of the LoRA.
        alpha: of the LoRA.
        lr: learning rate; 0 for the family's.
        batch_size: images per forward.
        grad_accumulation: batches per optimizer step.
        rollout_steps: K; 0 for the family's.
        warmup: steps over which the learning rate rises.
        ema_decay: of the ema teacher, per optimizer step.
        anchor_probability: share of batches that are prior anchors.
        grad_steps: m, how many of the K steps are backpropagated through; 0 for all.
        step_draw: how they are drawn.
    """

    steps: int
    rank: int
    alpha: float
    lr: float = 0.0
    batch_size: int = 1
    grad_accumulation: int = 1
    rollout_steps: int = 0
    warmup: int = 0
    ema_decay: float = 0.9999
    anchor_probability: float = 0.5
    grad_steps: int = 0
    step_draw: StepDraw = "uniform"


def _preset_of(config: TrainConfig) -> Preset:
    values = flattened(config)
    values["grad_steps"] = values["grad_steps"] or 0
    return Preset(**{field.name: values[field.name] for field in dataclasses.fields(Preset)})


_ALL_STEPS = Preset(steps=1000, rank=32, alpha=64.0)
_SUBJECT = Preset(steps=1500, rank=32, alpha=64.0, grad_steps=1, step_draw="gap")

PRESETS: Mapping[str, Preset] = {
    "subject": _SUBJECT,
    "style": _SUBJECT,
    "character": replace(_SUBJECT, steps=2 * _SUBJECT.steps, anchor_probability=0.75),
    "edit": _ALL_STEPS,
    "quick look": replace(_SUBJECT, steps=250, rank=16, alpha=32.0),
    "paper": Preset(steps=0, rank=64, alpha=128.0, grad_accumulation=4, anchor_probability=0.0),
    "demo model": _preset_of(demo_config()),
    "standard": _ALL_STEPS,
}
"""The first four are aims. All but edit learn from one of the K steps, drawn by its gap: on the demo that learns more
in the same time (`benchmarks/learning_curves.py`), but not edits (`benchmarks/edits.py`). character: as many steps on
images as subject, three times as many on anchors. paper: the authors' settings, with their 4 GPUs as gradient
accumulation. demo model: for that alone. standard: what subject was before it had that name, for saved graphs and
their runs."""

USUAL = "subject"
"""The preset where none is chosen."""

ON_COMMAND_LINE = {name.replace(" ", "-"): name for name in PRESETS if name != "demo model"}
"""The presets of `train --preset`, by the word that is written there."""


def preset_settings(preset: str, family: Family) -> dict[str, Any]:
    """The fields of a preset, with the family's values where it has 0."""
    settings = dict(vars(PRESETS[preset]))
    settings["steps"] = settings["steps"] or family.paper_steps
    settings["lr"] = settings["lr"] or family.learning_rate
    settings["rollout_steps"] = settings["rollout_steps"] or family.rollout_steps
    settings["grad_steps"] = settings["grad_steps"] or None
    return settings


def preset_config(preset: str, family: Family) -> TrainConfig:
    """The configuration of a preset for a family."""
    settings = {**preset_settings(preset, family), "targets": family.lora_targets}
    return changed(TrainConfig(family=family.name), settings)
