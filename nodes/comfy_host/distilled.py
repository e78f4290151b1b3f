"""Recognises undistilled checkpoints: D-OPSD trains the few steps of a distilled one, but any checkpoint loads.

Objectives that do not need few steps, such as sft, may train an undistilled one on purpose: its LoRA is then used on
the distilled model.

A distilled checkpoint and its base have the same architecture, so only hints distinguish them: the file's name, and for
some families an entry of ComfyUI's own detection (`ComfyFamily.undistilled`, `undistilled_config`).
"""

from __future__ import annotations

import re
from typing import Any

from .families import ComfyFamily, family_of, in_comfyui

_DE_DISTILLED = re.compile(r"de[-_ ]?(turbo|distill)|undistill")
_DISTILLED = re.compile(r"turbo|distill|lightning|(?<!\d)[48][-_ ]?step")


def warn_if_undistilled(model: Any, name: str) -> str | None:
    """One sentence for the user if the MODEL looks undistilled; None if not, or if there is no hint.

    name: of its file (`base_name`).
    """
    if not (reason := why_undistilled(model, name)):
        return None
    return (
        f"{_looks(name, reason)}: D-OPSD needs one that was distilled for few steps, such as "
        f"{in_comfyui(family_of(model)).distilled}; any other draws nothing usable in so few steps, and would learn "
        "from that"
    )


def note_if_undistilled(model: Any, name: str, objective: str) -> str | None:
    """The same for an objective that can train such a MODEL: what its LoRA is for."""
    if not (reason := why_undistilled(model, name)):
        return None
    return (
        f"{_looks(name, reason)}: {objective} trains it; use the LoRA on the distilled model "
        f"({in_comfyui(family_of(model)).distilled}); previews drawn by this one in so few steps are not usable"
    )


def why_undistilled(model: Any, name: str) -> str:
    """What the MODEL is recognised by as undistilled; empty if it is not, or if there is no hint."""
    entry = in_comfyui(family_of(model))
    return _reason(name.lower(), entry, model.model.model_config.unet_config) or ""


def _looks(name: str, reason: str) -> str:
    return f"{name or 'this model'} looks like an undistilled checkpoint ({reason})"


def _reason(name: str, entry: ComfyFamily, config: Any) -> str | None:
    if _DE_DISTILLED.search(name):
        return "by its name, the distillation was removed"
    if _DISTILLED.search(name):
        return None
    if re.search(entry.undistilled, name):
        return "by its name"
    is_base = any(key in config and config[key] == value for key, value in entry.undistilled_config.items())
    return "by its weights" if is_base else None
