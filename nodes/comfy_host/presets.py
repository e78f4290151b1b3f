"""The training configuration that a preset and the user's choices make."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ...dopsd_core.adapters.targets import parse_targets
from ...dopsd_core.config import TrainConfig
from ...dopsd_core.families import Family
from ...dopsd_core.old_config import former_identity
from ...dopsd_core.options import changed, split_unused
from ...dopsd_core.presets import PRESETS, USUAL, Preset, preset_settings
from .paths import DIGEST_DIGITS

__all__ = [
    "PRESETS",
    "USUAL",
    "given_settings",
    "make_config",
    "merged_settings",
    "preset_settings",
    "preset_steps",
    "run_digest",
]


def make_config(preset: str, family: Family, has_anchors: bool, chosen: Mapping[str, Any]) -> TrainConfig:
    """The preset with the user's choices on top.

    Args:
        chosen: options by flat name, only those that the user has set; all others come from the preset and the family.
            targets may be one text. Options without effect are left out.
        has_anchors: whether there are prompts for the prior anchor; if not, a preset's share of it becomes 0.

    Raises:
        ConfigError: with every invalid value and how to correct it.
    """
    used, _ = split_unused(TrainConfig, merged_settings(preset, family, has_anchors, chosen))
    return changed(TrainConfig(family=family.name), used)


def merged_settings(preset: str, family: Family, has_anchors: bool, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `make_config` by flat name, with those that have no effect; arguments as there."""
    settings = preset_settings(preset, family)
    if not has_anchors:
        settings["anchor_probability"] = 0.0
    settings |= chosen
    if "rank" in chosen and "alpha" not in chosen:
        settings["alpha"] = chosen["rank"] * PRESETS[preset].alpha / PRESETS[preset].rank
    wanted = settings.get("grad_steps") or 0
    settings["grad_steps"] = wanted if 0 < wanted < settings["rollout_steps"] else None
    if settings["grad_steps"] is None and "step_draw" not in chosen:
        settings["step_draw"] = "uniform"  # the preset's would be reported as without effect
    settings["warmup"] = min(settings["warmup"], max(settings["steps"] - 1, 0))
    targets = settings.pop("targets", ())
    settings["targets"] = (parse_targets(targets) if isinstance(targets, str) else targets) or family.lora_targets
    return settings


def given_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preset that the user has set."""
    return {field.name: chosen[field.name] for field in dataclasses.fields(Preset) if field.name in chosen}


def preset_steps() -> dict[str, int]:
    """Steps of each preset; 0 if the family decides."""
    return {name: preset.steps for name, preset in PRESETS.items()}


def run_digest(config: TrainConfig, *facts: str, settings: Mapping[str, Any] | None = None) -> str:
    """8 hex digits, equal for runs that may be resumed: from settings, model and dataset.

    Args:
        facts: digests of model, dataset and initial weights.
        settings: the `merged_settings`; release 0.2 also counted those without effect.
    """
    counted = former_identity(config.identity(), settings or {})
    return hashlib.sha256(json.dumps([counted, *facts], sort_keys=True).encode()).hexdigest()[:DIGEST_DIGITS]
