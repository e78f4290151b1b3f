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

_UNUSED: Mapping[str, Any] = {
    "grad_steps": None,
    "loss": "x0",
    "anchor_probability": 0.5,
    "ema_decay": 0.9999,
    "sft_sigmas": "logit-normal",
    "sft_shift": 3.0,
}
"""What release 0.2 also wrote of what was not chosen, and its default of it."""

_LORA = ("rank", "alpha", "targets")

FORMER = frozenset(
    {*_UNUSED, *_LORA, *(name for names in _CHOICES["optimizer"].values() for name in names), "warmup"}
    | {"adapter", "objective", "optimizer", "schedule", "teacher", "family", "batch_size", "grad_accumulation"}
    | {"max_grad_norm", "rollout_steps", "caption_dropout", "seed", "probe_pairs"}
)
"""By flat name: the options of release 0.2 that make a run another run. One that came since is no part of a run's
identity while it is at its default, so that the runs before it are still found."""

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


def former_identity(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`TrainConfig.identity` in the form of release 0.2, by which the folders of a node's runs are named.

    settings: what was set, by flat name, also for what is not chosen; it counted then.
    """
    unused = {name: settings.get(name, value) for name, value in _UNUSED.items()}
    fields = {**unused, **identity}
    former = {now: then for then, now in _RENAMED.items()}
    others = {former.get(name, name): value for name, value in fields.items() if name not in _LORA}
    if others.get("adapter") != "lora":
        return {former.get(name, name): value for name, value in fields.items()}
    del others["adapter"]
    return {"lora": {name: fields[name] for name in _LORA}, **others}
