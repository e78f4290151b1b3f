"""Several resolutions in one run: the same images at several sizes, drawn by share.

parse_resolutions("512:2 768 1024")     512 in half of the batches, 768 and 1024 in a quarter each
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..number_text import read_float, read_int
from .buckets import make_buckets, must_enlarge, nearest_bucket
from .dataset import DatasetReport, Pair

MIN_SIDE, MAX_SIDE, MAX_RESOLUTIONS = 32, 2048, 4


@dataclass(frozen=True)
class Resolution:
    """A resolution and how often it is drawn.

    Attributes:
        side: of a square image in pixels; others have about as many pixels.
        share: of the batches, in proportion to the other resolutions' shares; above 0.
    """

    side: int
    share: float


@dataclass(frozen=True)
class Scale:
    """The images of a dataset at one resolution.

    Attributes:
        side: the resolution.
        share: as in `Resolution`.
        pairs: the images that are at least this large, with their buckets.
    """

    side: int
    share: float
    pairs: tuple[Pair, ...]


def parse_resolutions(text: str, multiple: int = 16) -> tuple[Resolution, ...]:
    """Resolutions, by size, from a text such as "512:2, 768"; a share that is not given is 1. Empty for an empty text.

    multiple: sides are multiples of it.

    Raises:
        ValueError: it is no such list, has a resolution twice, or more than `MAX_RESOLUTIONS`.
    """
    words = re.split(r"[,;\s]+", text.strip()) if text.strip() else []
    found = sorted((_read(word, multiple) for word in words), key=lambda resolution: resolution.side)
    sides = [resolution.side for resolution in found]
    if len(set(sides)) < len(sides):
        twice = next(side for side in sides if sides.count(side) > 1)
        raise ValueError(f"resolutions: {twice} is there twice; give it one share")
    if len(found) > MAX_RESOLUTIONS:
        raise ValueError(f"resolutions: {len(found)} are too many; give at most {MAX_RESOLUTIONS}")
    return tuple(found)


def _read(word: str, multiple: int) -> Resolution:
    side_text, colon, share_text = word.partition(":")
    try:
        side, share = read_int(side_text), read_float(share_text) if colon else 1.0
    except ValueError as error:
        raise ValueError(f"resolutions: {word!r} is not like 512 or 512:2 (a side in pixels, a share)") from error
    if not MIN_SIDE <= side <= MAX_SIDE or side % multiple:
        raise ValueError(f"resolutions: {side} must be a multiple of {multiple} from {MIN_SIDE} to {MAX_SIDE}")
    if not (math.isfinite(share) and 0 < share <= 1000):
        raise ValueError(f"resolutions: the share of {side} is {share:g}; set it above 0 and at most 1000")
    return Resolution(side, share)


def smaller_budgets(resolutions: Sequence[Resolution]) -> tuple[int, ...]:
    """The pixels of all resolutions but the largest, for `read_dataset`, the largest of these first.

    resolutions: by size, as of `parse_resolutions`.
    """
    return tuple(resolution.side**2 for resolution in reversed(resolutions[:-1]))


def every_image(pairs: Sequence[Pair], scales: Sequence[Scale]) -> tuple[Pair, ...]:
    """Every image once, at the largest resolution that it is trained at; those of a larger resolution first.

    Args:
        pairs: the dataset, in the order for one resolution.
        scales: the dataset at each of several resolutions, the largest first; none for one.
    """
    if not scales:
        return tuple(pairs)
    found: dict[tuple[Path, tuple[Path, ...]], Pair] = {}
    for pair in (pair for scale in scales for pair in scale.pairs):
        found.setdefault((pair.image_path, pair.source_images), pair)
    return tuple(found.values())


def scales_of(
    report: DatasetReport, resolutions: Sequence[Resolution], multiple: int
) -> tuple[tuple[Scale, ...], tuple[str, ...]]:
    """(the dataset at each resolution, the largest first; remarks about images that are left out of one).

    An image that would be upsampled is only trained at the resolutions that it reaches, or at the smallest one.

    Raises:
        ValueError: no image reaches a resolution.
    """
    scales, remarks = [], []
    smallest = min((resolution.side for resolution in resolutions), default=0)
    for resolution in sorted(resolutions, key=lambda one: -one.side):
        buckets = make_buckets(resolution.side**2, multiple)
        fitted = [replace(pair, bucket=nearest_bucket(pair.width, pair.height, buckets)) for pair in report.pairs]
        kept = [
            pair
            for pair in fitted
            if resolution.side == smallest or not must_enlarge(pair.width, pair.height, pair.bucket)
        ]
        if not kept:
            raise ValueError(
                f"resolutions: no image is as large as {resolution.side}; leave it out, or use larger images"
            )
        if len(kept) < len(fitted):
            remarks.append(
                f"{len(fitted) - len(kept)} of {len(fitted)} images are smaller than {resolution.side} and not "
                "trained at it"
            )
        scales.append(Scale(resolution.side, resolution.share, tuple(kept)))
    return tuple(scales), tuple(remarks)
