"""Distilled or not: D-OPSD trains the few steps that a checkpoint was distilled for, but any checkpoint loads.

Z-Image and Z-Image-Turbo have one architecture, so only hints tell them apart: the file's name, and a mark that
ComfyUI's own detection leaves. It allows fp16 only where the second to last block's norm weights are small, as
Turbo's are and the base model's are not (Comfy-Org/ComfyUI pull request 12065, issue 12176).
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
    """One sentence for the user if the MODEL looks undistilled; None if not, or if nothing tells."""
    family, name = family_of(model), base_name(model)
    if (reason := _reason(name.lower(), family is Z_IMAGE, model)) is None:
        return None
    return (
        f"{name or 'this model'} looks like an undistilled checkpoint ({reason}): D-OPSD needs one that was distilled "
        f"for few steps, such as {in_comfyui(family).distilled}; another draws nothing usable in so few, and learns "
        "from that"
    )


def _reason(name: str, is_z_image: bool, model: Any) -> str | None:
    if _DE_DISTILLED.search(name):
        return "by its name the distillation was taken out"
    if _DISTILLED.search(name):
        return None
    if _BASE.search(name) and (is_z_image or "base" in name):
        return "by its name"
    small_norms = model.model.model_config.unet_config.get("allow_fp16")
    return "by its norm weights" if is_z_image and small_norms is False else None
