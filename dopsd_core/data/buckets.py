"""Aspect buckets: the few image sizes that a dataset is trained in.

A batch needs images of one size, and a network needs sides that are multiples of its patch. A bucket is such a size;
an image goes to the bucket of the nearest aspect ratio, is resized to cover it and loses what hangs over, equally on
both sides. Sizes are (width, height) in pixels throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_ASPECT = 7 / 3
"""The longest image: 1344x576, the authors' widest bucket. Beyond it the model has seen nothing."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    @property
    def area(self) -> int:
        """Pixels."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@lru_cache(maxsize=64)
def make_buckets(pixel_budget: int, multiple: int, max_aspect: float = MAX_ASPECT) -> tuple[Bucket, ...]:
    """Every size within the budget to which no row or column of `multiple` pixels can be added.

    Args:
        pixel_budget: the most pixels of an image, e.g. 1024 * 1024.
        multiple: both sides are multiples of it (16 for Z-Image and FLUX.2: 8 per latent, 2 latents per patch).
        max_aspect: longest side over shortest side, at least 1.

    Returns:
        Buckets sorted by width; with each WxH there is HxW.

    Raises:
        ValueError: the budget is smaller than one square of `multiple`, or an argument is out of range.
    """
    if multiple < 1 or max_aspect < 1:
        raise ValueError(f"multiple ({multiple}) and max_aspect ({max_aspect}) must be at least 1")
    if pixel_budget < multiple * multiple:
        raise ValueError(
            f"a pixel budget of {pixel_budget} holds no image with sides that are multiples of {multiple}; "
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
    """The bucket whose aspect ratio is nearest to width / height by |log ratio|; the larger one of two equal ones."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no aspect ratio")
    if not buckets:
        raise ValueError("there is no bucket to choose from")
    wanted = math.log(width / height)
    return min(buckets, key=lambda bucket: (abs(math.log(bucket.aspect) - wanted), -bucket.area, bucket.width))


def cover_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The largest centred part of an image that has the bucket's aspect: (left, top, right, bottom) in source pixels.

    Resizing this part to the bucket is the same as resizing the image until it covers the bucket and cutting equally
    on both sides, without the rounding of a size in between.
    """
    scale = min(width / bucket.width, height / bucket.height)
    kept_width, kept_height = min(bucket.width * scale, width), min(bucket.height * scale, height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def must_enlarge(width: int, height: int, bucket: Bucket) -> bool:
    """True when an image is smaller than its bucket on either side, so that its pixels are made up."""
    return width < bucket.width or height < bucket.height
