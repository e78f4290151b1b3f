"""Warns about undistilled checkpoints: D-OPSD trains the few steps of a distilled one, but any checkpoint loads.

A distilled checkpoint and its base have the same architecture, so only hints distinguish them: the file's name, and for
some families an entry of ComfyUI's own detection (`ComfyFamily.undistilled`, `undistilled_config`).
"""

from __future__ import annotations

import re
from typing import Any

from .denoiser import base_name
from .families import ComfyFamily, family_of, in_comfyui

_DE_DISTILLED = re.compile(r"de[-_ ]?(turbo|distill)|undistill")
_DISTILLED = re.compile(r"turbo|distill|lightning|(?<!\d)[48][-_ ]?step")


def warn_if_undistilled(model: Any) -> str | None:
    """One sentence for the user if the MODEL looks undistilled; None if not, or if there is no hint."""
    entry, name = in_comfyui(family_of(model)), base_name(model)
    if (reason := _reason(name.lower(), entry, model.model.model_config.unet_config)) is None:
        return None
    return (
        f"{name or 'this model'} looks like an undistilled checkpoint ({reason}): D-OPSD needs one that was distilled "
        f"for few steps, such as {entry.distilled}; any other draws nothing usable in so few steps, and would learn "
        "from that"
    )


def _reason(name: str, entry: ComfyFamily, config: Any) -> str | None:
    if _DE_DISTILLED.search(name):
        return "by its name, the distillation was removed"
    if _DISTILLED.search(name):
        return None
    if re.search(entry.undistilled, name):
        return "by its name"
    is_base = any(key in config and config[key] == value for key, value in entry.undistilled_config.items())
    return "by its weights" if is_base else None
