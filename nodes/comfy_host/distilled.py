"""Recognises undistilled checkpoints: D-OPSD trains the few steps of a distilled one, but any checkpoint loads.

Objectives that do not need few steps, such as sft, may train an undistilled one on purpose: its LoRA is then used on
the distilled model.

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
    if not (reason := why_undistilled(model)):
        return None
    return (
        f"{_looks(model, reason)}: D-OPSD needs one that was distilled for few steps, such as "
        f"{in_comfyui(family_of(model)).distilled}; any other draws nothing usable in so few steps, and would learn "
        "from that"
    )


def note_if_undistilled(model: Any, objective: str) -> str | None:
    """The same for an objective that can train such a MODEL: what its LoRA is for."""
    if not (reason := why_undistilled(model)):
        return None
    return (
        f"{_looks(model, reason)}: {objective} trains it; use the LoRA on the distilled model "
        f"({in_comfyui(family_of(model)).distilled}); previews drawn by this one in so few steps are not usable"
    )


def why_undistilled(model: Any) -> str:
    """What the MODEL is recognised by as undistilled; empty if it is not, or if there is no hint."""
    entry = in_comfyui(family_of(model))
    return _reason(base_name(model).lower(), entry, model.model.model_config.unet_config) or ""


def _looks(model: Any, reason: str) -> str:
    return f"{base_name(model) or 'this model'} looks like an undistilled checkpoint ({reason})"


def _reason(name: str, entry: ComfyFamily, config: Any) -> str | None:
    if _DE_DISTILLED.search(name):
        return "by its name, the distillation was removed"
    if _DISTILLED.search(name):
        return None
    if re.search(entry.undistilled, name):
        return "by its name"
    is_base = any(key in config and config[key] == value for key, value in entry.undistilled_config.items())
    return "by its weights" if is_base else None
