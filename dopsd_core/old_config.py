"""`config.json` of release 0.2, where every option stood at the top, in today's form.

The tables describe files that exist; they do not grow with the options.
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
"""Setting -> its choices -> the options of each: name then -> name now. The settings' names are the same."""

_DEFAULTS = {"objective": "dopsd", "optimizer": "adamw", "schedule": "constant", "teacher": "ema"}
_LORA_DEFAULTS = {"rank": 16, "alpha": 16.0}


def is_old(fields: Mapping[str, Any]) -> bool:
    """Whether JSON is of release 0.2: only there is the adapter called "lora", and it is in every file."""
    return "lora" in fields


def upgraded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in today's form. Options of what was not chosen, which changed nothing, are left out; what is unknown
    stays, to be reported."""
    new = {_RENAMED.get(name, name): value for name, value in fields.items()}
    lora = new.pop("lora")
    new["adapter"] = {"name": "lora", **_LORA_DEFAULTS, **lora} if isinstance(lora, Mapping) else lora
    for setting, choices in _CHOICES.items():
        given = {name: new.pop(name) for options in choices.values() for name in options if name in new}
        name = new.get(setting, _DEFAULTS[setting])
        options = choices.get(name, {}) if isinstance(name, str) else {}
        new[setting] = {"name": name, **{options[key]: value for key, value in given.items() if key in options}}
    return new
