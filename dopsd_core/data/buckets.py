"""Aspect ratio buckets: the few image sizes that a dataset is trained at.

All images of a batch must have the same size, and the sides must be multiples of the network's patch size. Each image
is assigned to the bucket with the nearest aspect ratio, resized to cover it and center-cropped. Sizes are
(width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_ASPECT = 7 / 3
"""The maximum aspect ratio: 1344x576, the authors' widest bucket and the widest that the model was trained on."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels.

    Attributes:
        width: width in pixels.
        height: height in pixels.
    """

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Aspect ratio, width / height."""
        return self.width / self.height

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@lru_cache(maxsize=64)
def make_buckets(pixel_budget: int, multiple: int, max_aspect: float = MAX_ASPECT) -> tuple[Bucket, ...]:
    """All sizes within the budget that cannot grow by another row or column of `multiple` pixels.

    Args:
        pixel_budget: maximum number of pixels of an image, e.g. 1024 * 1024.
        multiple: both sides are multiples of it (16 for Z-Image and FLUX.2: 8 per latent, 2 latents per patch).
        max_aspect: maximum ratio of the longer to the shorter side, at least 1.

    Returns:
        Buckets sorted by width; for each WxH there is HxW.

    Raises:
        ValueError: the budget is smaller than one square of `multiple`, or an argument is out of range.
    """
    if multiple < 1 or max_aspect < 1:
        raise ValueError(f"multiple ({multiple}) and max_aspect ({max_aspect}) must be at least 1")
    if pixel_budget < multiple * multiple:
        raise ValueError(
            f"no image with sides that are multiples of {multiple} fits a pixel budget of {pixel_budget}; "
            f"give at least {multiple * multiple}"
        )
    units = pixel_budget // (multiple * multiple)
    square = math.isqrt(units)
    sizes = {(square, square)}
    for columns in range(1, min(units, math.isqrt(int(units * max_aspect)) + 1) + 1):
        rows = units // columns
        is_full = units // rows == columns  # no further column fits beside these rows
        if is_full and max(columns, rows) <= max_aspect * min(columns, rows):
            sizes.add((columns, rows))
    return tuple(sorted(Bucket(columns * multiple, rows * multiple) for columns, rows in sizes))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the nearest aspect ratio to width / height by |log ratio|; the larger one on a tie."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no aspect ratio")
    if not buckets:
        raise ValueError("there is no bucket to choose from")
    wanted = math.log(width / height)
    return min(buckets, key=lambda bucket: (abs(math.log(bucket.aspect) - wanted), -bucket.area, bucket.width))


def cover_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The largest center crop with the bucket's aspect ratio: (left, top, right, bottom) in source pixels.

    Resizing this crop to the bucket equals resizing the image to cover the bucket and center-cropping it, without the
    rounding of an intermediate size.
    """
    scale = min(width / bucket.width, height / bucket.height)
    kept_width, kept_height = min(bucket.width * scale, width), min(bucket.height * scale, height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def must_enlarge(width: int, height: int, bucket: Bucket) -> bool:
    """Whether an image is smaller than its bucket in width or height and would be upsampled."""
    return width < bucket.width or height < bucket.height
