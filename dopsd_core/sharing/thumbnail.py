"""The thumbnail of a LoRA."""

from __future__ import annotations

import io

from PIL import Image, ImageOps
from torch import Tensor

SIDE = 256
"""Pixels, as ModelSpec recommends."""

_QUALITY = 85


def jpeg_thumbnail(image: Tensor) -> bytes:
    """A JPEG of 256 x 256 pixels, of the largest square in the middle of an image [H, W, C] in [0, 1].

    C is 3, 1 for a grey image, or 4 with transparency, behind which the image is white.
    """
    pixels = image.detach().cpu().float().nan_to_num().clamp(0, 1)
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
    whole = (pixels.expand(*pixels.shape[:2], 3) * 255).round().byte().numpy()
    square = ImageOps.fit(Image.fromarray(whole), (SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    square.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
