"""Converts `config.json` of release 0.2, where all options were at the top level, and of later commits to this form.

The tables describe existing files; they do not grow with new options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RENAMED = {"clip": "max_grad_norm"}

_CHOICES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "objective": {
        "dopsd": {"grad_steps": "grad_steps", "loss": "loss", "anchor_probability": "anchor_probability"},
        "sft": {"sft_sigmas": "sigmas", "sft_shift": "shift"},
    },
    "optimizer": dict.fromkeys(("adamw", "adamw8bit"), {"lr": "lr", "weight_decay": "weight_decay"}),
    "schedule": dict.fromkeys(("constant", "cosine"), {"warmup": "warmup"}),
    "teacher": {"ema": {"ema_decay": "decay"}, "frozen": {}, "same": {}},
}
"""Setting -> its choices -> the options of each: old name -> new name. The names of the settings are unchanged."""

_UNUSED: Mapping[str, Any] = {
    "grad_steps": None,
    "loss": "x0",
    "anchor_probability": 0.5,
    "ema_decay": 0.9999,
    "sft_sigmas": "logit-normal",
    "sft_shift": 3.0,
}
"""Options of variants that were not chosen, which release 0.2 also wrote, and their defaults."""

_LORA = ("rank", "alpha", "targets")

FORMER = frozenset(
    {*_UNUSED, *_LORA, *(name for names in _CHOICES["optimizer"].values() for name in names), "warmup"}
    | {"adapter", "objective", "optimizer", "schedule", "teacher", "family", "batch_size", "grad_accumulation"}
    | {"max_grad_norm", "rollout_steps", "caption_dropout", "seed", "probe_pairs"}
)
"""The options of release 0.2 that identify a run, by flat name. Options added later are not part of a run's identity
at their defaults, so that older runs are still found."""

_DROPPED: Mapping[str, Any] = {"magnitude_weight": 1.0, "band_low": 0.0, "band_high": 1.0}
"""Options of objective dopsd that were tried and dropped, and their defaults, without effect."""

_DEFAULTS = {"objective": "dopsd", "optimizer": "adamw", "schedule": "constant", "teacher": "ema"}
_LORA_DEFAULTS = {"rank": 16, "alpha": 16.0}


def is_old(fields: Mapping[str, Any]) -> bool:
    """Whether the JSON is from release 0.2, which always has the key "lora"."""
    return "lora" in fields


def without_dropped(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without options that had no effect and are no longer there; others are kept, to be reported."""
    objective = fields.get("objective")
    if not isinstance(objective, Mapping):
        return dict(fields)
    kept = {name: value for name, value in objective.items() if name not in _DROPPED or value != _DROPPED[name]}
    return {**fields, "objective": kept}


def upgraded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the fields to the current form.

    Options of variants that are not chosen had no effect and are dropped; unknown ones are kept, to be reported.
    """
    new = {_RENAMED.get(name, name): value for name, value in fields.items()}
    lora = new.pop("lora")
    new["adapter"] = {"name": "lora", **_LORA_DEFAULTS, **lora} if isinstance(lora, Mapping) else lora
    for setting, choices in _CHOICES.items():
        given = {name: new.pop(name) for options in choices.values() for name in options if name in new}
        name = new.get(setting, _DEFAULTS[setting])
        options = choices.get(name, {}) if isinstance(name, str) else {}
        new[setting] = {"name": name, **{options[key]: value for key, value in given.items() if key in options}}
    return new


def former_identity(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`TrainConfig.identity` in the form of release 0.2, which determines the folder names of a node's runs.

    settings: all values that were set, by flat name, including those of variants that are not chosen.
    """
    unused = {name: settings.get(name, value) for name, value in _UNUSED.items()}
    fields = {**unused, **identity}
    former = {now: then for then, now in _RENAMED.items()}
    others = {former.get(name, name): value for name, value in fields.items() if name not in _LORA}
    if others.get("adapter") != "lora":
        return {former.get(name, name): value for name, value in fields.items()}
    del others["adapter"]
    return {"lora": {name: fields[name] for name in _LORA}, **others}
