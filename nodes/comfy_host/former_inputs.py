"""Inputs of D-OPSD Train LoRA in release 0.2 that are now on Training Settings.

A graph saved with that release still loads and runs: they stay in the schema, in their places, and the page hides those
at their defaults. 0 means the preset's value; for `anchor_probability`, any number below 0 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ...dopsd_core.options import Option
from .settings import OPTIONS

_HIDDEN = {"optional": True, "extra_dict": {"hidden": True}}
_TOOLTIP = "Kept for graphs saved with release 0.2; use Training Settings instead."


@dataclass(frozen=True)
class Former:
    """An input of release 0.2.

    Attributes:
        option: flat name of the option that it sets.
        default: the widget's default, which means the preset's or the core's value.
        low: the smallest number of the widget.
    """

    option: str
    default: Any
    low: float = 0


BEFORE_MEMORY: Mapping[str, Former] = {
    "learning_rate": Former("lr", 0.0),
    "rank": Former("rank", 0),
    "alpha": Former("alpha", 0.0),
    "batch_size": Former("batch_size", 0),
    "grad_accumulation": Former("grad_accumulation", 0),
    "warmup": Former("warmup", 0),
    "rollout_steps": Former("rollout_steps", 4, 1),
    "grad_steps": Former("grad_steps", 0),
    "loss": Former("loss", "x0"),
    "teacher": Former("teacher", "ema"),
    "ema_decay": Former("ema_decay", 0.0),
    "anchor_probability": Former("anchor_probability", -1.0, -1.0),
    "objective": Former("objective", "dopsd"),
    "schedule": Former("schedule", "constant"),
    "optimizer": Former("optimizer", "adamw"),
    "checkpoint_every": Former("checkpoint_every", 100, 1),
    "probe_every": Former("probe_every", 25),
}
"""By input name; between the inputs preview_every and memory."""

AFTER_INITIAL_LORA: Mapping[str, Former] = {
    "targets": Former("targets", ""),
    "deterministic": Former("deterministic", False),
}
"""By input name; after the input initial_lora."""

FORMER_INPUTS: Mapping[str, Former] = {**BEFORE_MEMORY, **AFTER_INITIAL_LORA}
"""All of them."""


def former_inputs(former: Mapping[str, Former]) -> list[Any]:
    """The hidden inputs, with the widgets, choices and bounds of release 0.2."""
    return [_input(name, entry, OPTIONS[entry.option]) for name, entry in former.items()]


def former_choices(widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The options, by flat name, that these widgets set; a widget at its default sets none."""
    return {
        entry.option: widgets[name]
        for name, entry in FORMER_INPUTS.items()
        if name in widgets and not _is_untouched(entry, widgets[name])
    }


def _is_untouched(entry: Former, value: Any) -> bool:
    return value < 0 if entry.option == "anchor_probability" else value == entry.default


def _input(name: str, entry: Former, option: Option) -> Any:
    if option.choices:
        return io.Combo.Input(name, options=list(option.choices), default=entry.default, tooltip=_TOOLTIP, **_HIDDEN)
    if option.is_many:
        return io.String.Input(name, default=entry.default, tooltip=_TOOLTIP, **_HIDDEN)
    if option.kind is bool:
        return io.Boolean.Input(name, default=entry.default, tooltip=_TOOLTIP, **_HIDDEN)
    most = option.bounds.high if option.bounds.high is not None else option.hint.most
    kind = io.Int if option.kind is int else io.Float
    finely = {} if kind is io.Int else {"step": option.hint.step, "round": False}
    return kind.Input(name, default=entry.default, min=entry.low, max=most, tooltip=_TOOLTIP, **finely, **_HIDDEN)
