"""Converts the colours of image files to sRGB, which models are trained on and viewers show.

The colour space is given by an embedded ICC profile, by PNG chunks, or by EXIF. Phones write Display P3 and cameras
Adobe RGB; interpreted as sRGB, their colours are pale. Files without any information are sRGB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

from PIL import Image, ImageCms

from .icc import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    BT_709_CURVE,
    BT_2020,
    DISPLAY_P3,
    SRGB,
    SRGB_CURVE,
    Primaries,
    make_profile,
)

_SAME = 2  # levels of 255 by which profiles that mean sRGB differ from it
_SPACES = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",)}

_CODED_PRIMARIES = {1: SRGB, 9: BT_2020, 12: DISPLAY_P3}
_CODED_CURVES: dict[int, float | tuple[float, ...]] = {
    1: BT_709_CURVE,
    4: 2.2,
    5: 2.8,
    6: BT_709_CURVE,
    8: 1.0,
    13: SRGB_CURVE,
    14: BT_709_CURVE,
    15: BT_709_CURVE,
}
"""Transfer curves of PNG's cICP chunk (ITU-T H.273), without the high dynamic ranges 16 and 18."""

_GAMMA_OF_SRGB, _GAMMA_ROUNDING, _CHROMATICITY_ROUNDING = 0.45455, 0.01, 0.005
_EXIF_IFD, _INTEROP_IFD, _COLOR_SPACE, _INTEROP_INDEX = 0x8769, 0xA005, 0xA001, 1


@dataclass(frozen=True)
class Colours:
    """The colour space of an image.

    Attributes:
        profile: the ICC profile of its values; None for sRGB.
        remark: a warning if the profile was guessed or could not be read, else "".
    """

    profile: bytes | None = None
    remark: str = ""


class ColourError(ValueError):
    """Raised if a profile cannot be applied to an image; the message gives the reason."""


def colours_of(image: Image.Image, profile: bytes | None, coding: tuple[int, int, int, int] | None = None) -> Colours:
    """The colour space of an opened image, from the most precise information available.

    Args:
        image: the image.
        profile: its embedded profile; empty if it cannot be read.
        coding: the numbers of PNG's cICP chunk.
    """
    if coding is not None:
        return _coded(coding)
    if profile:
        return Colours(profile)
    if profile is not None:
        return Colours(remark="its colour profile is damaged: its colours are taken as sRGB; save it as sRGB")
    if "srgb" in image.info:
        return Colours()
    if "gamma" in image.info or "chromaticity" in image.info:
        return _numbered(image.info)
    if image.mode == "CMYK":
        return Colours(remark="CMYK without a colour profile: its colours are an estimate; save it as sRGB")
    return _by_exif(image)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts an L, RGB or CMYK image from `profile` to RGB in sRGB, with perceptual intent like viewers.

    Raises:
        ColourError: the profile cannot be applied.
    """
    try:
        space = _space(profile)
        if space not in _SPACES[image.mode]:
            raise ColourError(f"it is for {space} images, this one is {image.mode}")
        if image.mode == "L" and space == "RGB":
            image = image.convert("RGB")
        transform = _transform(profile, image.mode)
        return image.convert("RGB") if transform is None else _applied(transform, image)
    except ColourError:
        raise
    except Exception as error:  # LittleCMS and Pillow raise several kinds on damaged profiles, and where it is missing
        raise ColourError(str(error) or type(error).__name__) from error


def _space(profile: bytes) -> str:
    opened: Any = ImageCms.ImageCmsProfile(BytesIO(profile))
    return opened.profile.xcolor_space.strip()


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if it is sRGB already, so that the pixels stay unchanged."""
    source: Any = ImageCms.ImageCmsProfile(BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    probe = _probe(mode)
    changed = _applied(transform, probe).tobytes()
    differences = (abs(a - b) for a, b in zip(changed, probe.convert("RGB").tobytes(), strict=True))
    return None if max(differences) <= _SAME else transform


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    if changed is None:
        raise ColourError("it cannot be applied")
    return changed


def _probe(mode: str) -> Image.Image:
    """Colours from all over the space."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    levels = range(0, 256, 17)
    return Image.frombytes(
        "RGB", (16**3, 1), bytes(c for r in levels for g in levels for b in levels for c in (r, g, b))
    )


# -- statements without a profile --------------------------------------------------------------------------------------


def _coded(coding: tuple[int, int, int, int]) -> Colours:
    primaries, curve, matrix, is_full = coding
    if (primaries, curve) == (1, 13) and matrix == 0 and is_full:
        return Colours()
    if primaries not in _CODED_PRIMARIES or curve not in _CODED_CURVES or matrix != 0 or not is_full:
        numbers = "/".join(map(str, coding))
        return Colours(remark=f"its colours are coded as {numbers} (cICP), which is not read; save it as sRGB")
    return Colours(make_profile(_CODED_PRIMARIES[primaries], _CODED_CURVES[curve]))


def _numbered(info: dict[Any, Any]) -> Colours:
    """PNG's gAMA and cHRM: the exponent that the numbers were coded with, and white, red, green, blue as x, y."""
    gamma, corners = info.get("gamma"), info.get("chromaticity")
    is_srgb = gamma is None or abs(gamma - _GAMMA_OF_SRGB) < _GAMMA_ROUNDING
    primaries = SRGB
    if corners is not None:
        white, red, green, blue = zip(corners[::2], corners[1::2], strict=True)
        primaries = Primaries(red, green, blue, white)
    wanted = [value for corner in (SRGB.white, SRGB.red, SRGB.green, SRGB.blue) for value in corner]
    if corners is None or max(abs(a - b) for a, b in zip(corners, wanted, strict=True)) < _CHROMATICITY_ROUNDING:
        if is_srgb:
            return Colours()
        primaries = SRGB
    try:
        profile = make_profile(primaries, SRGB_CURVE if gamma is None or is_srgb else 1 / gamma)
    except (ValueError, ZeroDivisionError, struct.error):
        return Colours(remark="its gamma or its primaries make no sense: its colours are taken as sRGB")
    return Colours(
        profile, "has no colour profile: its colours are converted from its gamma and primaries (gAMA, cHRM)"
    )


def _by_exif(image: Image.Image) -> Colours:
    try:
        exif = image.getexif()
        space = exif.get_ifd(_EXIF_IFD).get(_COLOR_SPACE)
        index = str(exif.get_ifd(_INTEROP_IFD).get(_INTEROP_INDEX, "")).strip("\0 ")
    except Exception:  # damaged EXIF raises nearly anything; `images` remarks on it
        return Colours()
    if space == 2 or (index == "R03" and space != 1):
        remark = "has no colour profile: its colours are converted from Adobe RGB, as its EXIF says"
        return Colours(make_profile(ADOBE_RGB, ADOBE_GAMMA), remark)
    if space not in (None, 1):
        return Colours(remark="its EXIF says that it is not sRGB, and it has no colour profile: save it as sRGB")
    return Colours()
