"""The size at which a teacher's vision tower sees an image."""

from __future__ import annotations

import math

from ..demo.model_files import VISION_CELL, vision_size

MIN_PIXELS, MAX_PIXELS = 512 * 512, 768 * 768
"""Qwen3-VL sees images at 512^2 to 768^2 pixels, like the paper's teacher for Z-Image-Turbo."""


def seen_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width at which an image is seen: multiples of 32 within the limits, aspect ratio about kept.

    The rule of Qwen3-VL's own image processor; if both limits are equal, the demo's (`vision_size`).
    """
    if min_pixels == max_pixels:
        return vision_size(height, width, min_pixels)
    cell, area = VISION_CELL, height * width
    rows, columns = round(height / cell), round(width / cell)
    if rows * columns * cell * cell > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / cell)) for side in (height, width))
    elif rows * columns * cell * cell < min_pixels:
        grow = math.sqrt(min_pixels / area)
        rows, columns = (math.ceil(side * grow / cell) for side in (height, width))
    return rows * cell, columns * cell
