"""Recognises undistilled checkpoints: D-OPSD trains the few steps of a distilled one, but any checkpoint loads.

Objectives that do not need few steps, such as sft, may train an undistilled one on purpose: its LoRA is then used on
the distilled model.

Z-Image and Z-Image-Turbo have the same architecture, so only hints distinguish them: the file's name, and a flag of
ComfyUI's own detection. It allows fp16 only if the norm weights of the second to last block are small, as they are in
Turbo and not in the base model (Comfy-Org/ComfyUI pull request 12065, issue 12176).
"""

from __future__ import annotations

import re
from typing import Any

from ...dopsd_core.families import Z_IMAGE
from .denoiser import base_name
from .families import family_of, in_comfyui

_DE_DISTILLED = re.compile(r"de[-_ ]?(turbo|distill)|undistill")
_DISTILLED = re.compile(r"turbo|distill|lightning|(?<!\d)[48][-_ ]?step")
_BASE = re.compile(
    r"(?<![a-z])base(?![a-z])|z[-_]?image([-_](bf16|fp\w+|int\w+|mxfp\w+|nvfp\w+|scaled|convrot|q\d\w*))*\.\w+"
)


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
    return _reason(base_name(model).lower(), family_of(model) is Z_IMAGE, model) or ""


def _looks(model: Any, reason: str) -> str:
    return f"{base_name(model) or 'this model'} looks like an undistilled checkpoint ({reason})"


def _reason(name: str, is_z_image: bool, model: Any) -> str | None:
    if _DE_DISTILLED.search(name):
        return "by its name, the distillation was removed"
    if _DISTILLED.search(name):
        return None
    if _BASE.search(name) and (is_z_image or "base" in name):
        return "by its name"
    small_norms = model.model.model_config.unet_config.get("allow_fp16")
    return "by its norm weights" if is_z_image and small_norms is False else None
