"""Masks: where the subject of an image is, so that the teacher can be shown the subject alone.

The mask of `a.png` is `a.mask.png` beside it, white where the subject is, or else the image's own transparency, if it
is opaque at the subject and transparent around it. A mask changes what the teacher sees; the image that is learned, and
the loss, stay whole. Legend: H, W height and width of the bucket in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..conditioning.teachers import Background
from .buckets import Bucket
from .images import SUFFIXES, Decoded, ImageError, decode, fit

MASK = ".mask"
"""End of a mask's name before its suffix."""

_HALF = 128
"""From this value on a pixel of a mask counts as subject, where it is asked whether there is a subject at all."""

_ASPECT = 0.01
"""Largest relative difference between the aspect ratios of an image and its mask."""

_BLUR = 12
"""The background is blurred over this part of the shorter side, three times."""

_FILL = {"grey": 0.5, "remove": 1.0}


def is_named_as_mask(path: Path) -> bool:
    """Whether the name is that of a mask."""
    return path.stem.lower().endswith(MASK) and path.suffix.lower() in SUFFIXES


def masks_beside(image: Path) -> list[Path]:
    """The mask files of an image, normally one or none: `a.mask.png`, also with `.mask`, `.png` or both in capitals."""
    found: dict[tuple[int, int], Path] = {}  # one file of several spellings, where the system does not tell case
    for suffix in SUFFIXES:
        for name in (MASK + suffix, MASK + suffix.upper(), MASK.upper() + suffix, (MASK + suffix).upper()):
            path = image.with_name(image.stem + name)
            if path.is_file():
                status = path.stat()
                found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def opacity_of(alpha: Image.Image) -> tuple[int, int]:
    """The least and the greatest value, 0 to 255, of the opacity of an image, or of a mask."""
    return cast("tuple[int, int]", alpha.getextrema())


def tells_subject(opacity: tuple[int, int]) -> bool:
    """Whether transparency from the first to the second of these values, 0 to 255, separates subject and background."""
    return opacity[0] < _HALF <= opacity[1]


def read_mask(mask: Path, image: Path) -> Image.Image:
    """A mask as a grey image, white where the subject is; `mask` is the image itself if its transparency is the mask.

    Raises:
        ImageError: it cannot be read, does not fit the image, has no subject, or is transparent itself.
    """
    decoded = decode(image)
    if mask == image:
        if decoded.alpha is None or not tells_subject(opacity_of(decoded.alpha)):
            raise ImageError("is no longer opaque at the subject and transparent around it")
        return decoded.alpha
    grey = _black_and_white(decode(mask))
    _check(grey, decoded.image.size)
    return grey


def _black_and_white(decoded: Decoded) -> Image.Image:
    if decoded.alpha is not None:
        raise ImageError("the mask is transparent: save it in black and white, white where the subject is")
    return decoded.image.convert("L")


def _check(mask: Image.Image, size: tuple[int, int]) -> None:
    (width, height), (wanted_width, wanted_height) = mask.size, size
    if abs(width * wanted_height - height * wanted_width) > _ASPECT * height * wanted_width:
        raise ImageError(
            f"the mask is {width}x{height} and its image {wanted_width}x{wanted_height}: make it of the image's size"
        )
    darkest, brightest = opacity_of(mask)
    if brightest < _HALF:
        raise ImageError("the mask has no subject: make it white where the subject is")
    if darkest == 255:
        raise ImageError("the mask is white everywhere: make it black where the background is, or remove it")


def load_mask(mask: Path, image: Path, bucket: Bucket) -> Tensor:
    """A mask, resized and cropped as its image is: [1, H, W] fp32, 1 where the subject is.

    Raises:
        ImageError: as in `read_mask`.
    """
    grey = fit(read_mask(mask, image), bucket)
    flat = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8)
    return flat.view(1, grey.height, grey.width).float().div(255)


def subject_alone(image: Tensor, mask: Tensor, background: Background) -> Tensor:
    """The image [3, H, W] in [0, 1] with another background; mask [1, H, W], 1 where the subject is.

    background: "blur", "grey", "remove" (white), or "keep" for the image as it is.
    """
    if background == "keep":
        return image
    behind = _blurred(image, 1 - mask) if background == "blur" else torch.full_like(image, _FILL[background])
    return image * mask + behind * (1 - mask)


def _blurred(image: Tensor, weight: Tensor) -> Tensor:
    """The mean [3, H, W] of the pixels around with these weights [1, H, W], so that the subject leaves no shade."""
    size = max(3, min(image.shape[1:]) // _BLUR | 1)
    mean, share = image * weight, weight
    for _ in range(3):
        mean, share = (
            F.avg_pool2d(part[None], size, stride=1, padding=size // 2, count_include_pad=False)[0]
            for part in (mean, share)
        )
    return mean / share.clamp_min(1e-6)
