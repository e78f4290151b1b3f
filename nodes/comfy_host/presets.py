"""Named settings for training, and the configuration that they and the advanced inputs make together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...dopsd_core.adapters.targets import parse_targets
from ...dopsd_core.config import TrainConfig
from ...dopsd_core.families import Family
from ...dopsd_core.old_config import former_identity
from ...dopsd_core.options import changed, split_unused


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One set of settings; steps 0 are the paper's for the family, lr 0 is the family's. The fields are flat names of
    options."""

    steps: int
    rank: int
    alpha: float
    lr: float = 0.0
    batch_size: int = 1
    grad_accumulation: int = 1
    warmup: int = 0
    ema_decay: float = 0.9999
    anchor_probability: float = 0.5


PRESETS: Mapping[str, Preset] = {
    "standard": Preset(steps=1000, rank=32, alpha=64.0),
    "quick look": Preset(steps=250, rank=16, alpha=32.0),
    "paper": Preset(steps=0, rank=64, alpha=128.0, grad_accumulation=4, anchor_probability=0.0),
    "demo model": Preset(steps=120, rank=16, alpha=16.0, lr=2e-3, batch_size=4, warmup=10, ema_decay=0.999),
}
"""paper: the authors' settings, their 4 GPUs as gradient accumulation. demo model: for the embedded one only."""


def make_config(preset: str, family: Family, has_anchors: bool, chosen: Mapping[str, Any]) -> TrainConfig:
    """The preset with the user's choices put over it.

    Args:
        chosen: options by flat name; 0, or below 0 for `anchor_probability`, keeps the preset's value of those that a
            preset has. And targets, one text; empty for the family's. Options of what is not chosen are left out.
        has_anchors: whether there are prompts for the prior anchor; without any a preset's share of it is 0.

    Raises:
        ConfigError: with everything wrong and its remedy.
    """
    used, _ = split_unused(TrainConfig, merged_settings(preset, family, has_anchors, chosen))
    return changed(TrainConfig(family=family.name), used)


def merged_settings(preset: str, family: Family, has_anchors: bool, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options by flat name that `make_config` takes, also those of what is not chosen; arguments as there."""
    settings = preset_settings(preset, family)
    if not has_anchors:
        settings["anchor_probability"] = 0.0
    settings |= {name: value for name, value in chosen.items() if name not in settings} | given_settings(chosen)
    if chosen.get("rank") and not chosen.get("alpha"):
        settings["alpha"] = chosen["rank"] * PRESETS[preset].alpha / PRESETS[preset].rank
    learned = settings.get("grad_steps") or 0
    settings["grad_steps"] = learned if 0 < learned < settings.get("rollout_steps", family.rollout_steps) else None
    settings["warmup"] = min(settings["warmup"], max(settings["steps"] - 1, 0))
    settings["targets"] = parse_targets(settings.pop("targets", "")) or family.lora_targets
    return settings


def preset_settings(preset: str, family: Family) -> dict[str, Any]:
    """The fields of a preset; what it leaves to the family is the family's."""
    settings = dict(vars(PRESETS[preset]))
    settings["steps"] = settings["steps"] or family.paper_steps
    settings["lr"] = settings["lr"] or family.learning_rate
    return settings


def given_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields that a preset has, those that the user has set: see `make_config`."""
    names = [field.name for field in dataclasses.fields(Preset) if field.name in chosen]
    return {name: chosen[name] for name in names if not _keeps_preset(name, chosen[name])}


def _keeps_preset(name: str, value: float) -> bool:
    return value < 0 if name == "anchor_probability" else value == 0


def run_digest(config: TrainConfig, *facts: str, settings: Mapping[str, Any] | None = None) -> str:
    """8 hex digits that stay the same as long as a run may be resumed: settings, and facts of model and data.

    settings: the `merged_settings`, of which release 0.2 counted those of what is not chosen too.
    """
    counted = former_identity(config.identity(), settings or {})
    return hashlib.sha256(json.dumps([counted, *facts], sort_keys=True).encode()).hexdigest()[:8]
