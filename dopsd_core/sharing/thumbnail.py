"""The thumbnail of a LoRA."""

from __future__ import annotations

import io

from PIL import Image, ImageOps
from torch import Tensor

SIDE = 256
"""Pixels, as ModelSpec recommends."""

_QUALITY = 85


def jpeg_thumbnail(image: Tensor) -> bytes:
    """A JPEG of 256 x 256 pixels, of the largest square in the middle of an image [H, W, 3] in [0, 1]."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
    square = ImageOps.fit(Image.fromarray(pixels), (SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    square.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
