"""Warns about undistilled checkpoints: D-OPSD trains the few steps of a distilled one, but any checkpoint loads.

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
    family, name = family_of(model), base_name(model)
    if (reason := _reason(name.lower(), family is Z_IMAGE, model)) is None:
        return None
    return (
        f"{name or 'this model'} looks like an undistilled checkpoint ({reason}): D-OPSD needs one that was distilled "
        f"for few steps, such as {in_comfyui(family).distilled}; any other draws nothing usable in so few steps, and "
        "would learn from that"
    )


def _reason(name: str, is_z_image: bool, model: Any) -> str | None:
    if _DE_DISTILLED.search(name):
        return "by its name, the distillation was removed"
    if _DISTILLED.search(name):
        return None
    if _BASE.search(name) and (is_z_image or "base" in name):
        return "by its name"
    small_norms = model.model.model_config.unet_config.get("allow_fp16")
    return "by its norm weights" if is_z_image and small_norms is False else None
