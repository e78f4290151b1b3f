"""Model families: data and a few pure functions each. A new family is one module here and an entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Family
from .flux2_klein import FLUX2_KLEIN
from .krea2 import KREA2
from .qwen_image21 import QWEN_IMAGE21
from .z_image import Z_IMAGE

__all__ = ["FAMILIES", "FLUX2_KLEIN", "KREA2", "QWEN_IMAGE21", "Z_IMAGE", "Family", "get_family"]

FAMILIES: Mapping[str, Family] = {family.name: family for family in (Z_IMAGE, FLUX2_KLEIN, KREA2, QWEN_IMAGE21)}


def get_family(name: str) -> Family:
    """The family with this name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}; known families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
