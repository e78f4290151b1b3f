"""Which image the teacher sees for a pair or a prompt, and how: whole, or the subject alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..conditioning.cache import digest_bytes
from ..conditioning.encode import EncodeRequest, ImageInput
from ..conditioning.teachers import Background
from ..data.buckets import Bucket
from ..data.dataset import Pair
from ..data.images import ImageError, load_image
from ..data.masks import load_mask, subject_alone
from ..data.resolutions import Scale
from ..data.triggers import concepts_of, names_concept
from ..text import printable

TeacherImage = Literal["own", "other"]
"""Which image the teacher sees: the pair's own, or other images of the concept, which cannot be copied."""

MAX_OTHERS = 3
"""Number of other images from which one is sampled per visit."""


def shown_to_teacher(pairs: Sequence[Pair], index: int, teacher_image: TeacherImage) -> list[Pair]:
    """The pairs whose images the teacher may see for pair `index`: itself, or those of its concept after it,
    cyclically."""
    if teacher_image == "own":
        return [pairs[index]]
    name = pairs[index].trigger.casefold()
    after = [pairs[(index + step) % len(pairs)] for step in range(1, len(pairs))]
    return [pair for pair in after if pair.trigger.casefold() == name][:MAX_OTHERS]


def pair_of_prompt(pairs: Sequence[Pair], prompt: str, number: int) -> int:
    """Index of a pair whose image the teacher sees for a prompt: of the concept that it names, if there are several;
    the first one for prompt 0, the next for 1, and so on."""
    names = concepts_of(pair.trigger for pair in pairs)
    named = [name.casefold() for name in names if len(names) > 1 and names_concept(prompt, name)]
    named.sort(key=len, reverse=True)  # one may be a part of another
    fitting = [index for index, pair in enumerate(pairs) if not named or pair.trigger.casefold() == named[0]]
    return fitting[number % len(fitting)]


def require_others(pairs: Sequence[Pair], scales: Sequence[Scale]) -> None:
    """Checks that there is another image of its concept for each image, at each resolution.

    Args:
        pairs: each image once.
        scales: the same images at several resolutions, if there are several.

    Raises:
        ValueError: an image is the only one.
    """
    several = len({pair.trigger.casefold() for pair in pairs}) > 1
    for side, group in ((0, pairs), *((scale.side, scale.pairs) for scale in scales)):
        names = Counter(pair.trigger.casefold() for pair in group)
        alone = next((pair for pair in group if names[pair.trigger.casefold()] < 2), None)
        if alone is None:
            continue
        of_it = f" of {alone.trigger}" if several else ""
        if not side:
            raise ValueError(f"teacher_image other needs at least two images{of_it}; add some, or set it to own")
        raise ValueError(
            f"teacher_image other needs at least two images{of_it} at the resolution {side}, and only "
            f"{alone.image_path.name} is that large: leave {side} out, add a larger image, or set teacher_image to own"
        )


def require_masks(pairs: Sequence[Pair], background: Background) -> None:
    """Checks that the background can be changed.

    Raises:
        ValueError: no image has a mask.
    """
    if background != "keep" and all(pair.mask is None for pair in pairs):
        raise ValueError(
            f"teacher_background {background} needs masks, and no image has one: put a.mask.png beside a.png, white "
            "where the subject is, or set it to keep"
        )


def mask_remarks(pairs: Sequence[Pair], background: Background) -> list[str]:
    """Which masks are not used, and which images have none, as sentences."""
    if background == "keep":
        unused = sum(pair.mask not in (None, pair.image_path) for pair in pairs)
        return [f"the masks of {unused} images are not used: teacher_background is keep"] if unused else []
    lacking = sum(pair.mask is None for pair in pairs)
    return [f"{lacking} of {len(pairs)} images have no mask: the teacher sees them whole"] if lacking else []


def encode_request(
    pair: Pair, caption: str, shown: Pair | None = None, background: Background = "keep"
) -> EncodeRequest:
    """A request for the pair with a caption; source images are cropped like the target, as by the authors.

    Args:
        shown: the pair whose image the teacher sees; None for the same pair.
        background: what the teacher sees around the subject, where that image has a mask.
    """
    seen, is_whole = shown or pair, background == "keep" or (shown or pair).mask is None
    other = None if seen is pair and is_whole else seen_by_teacher(seen, background)
    return EncodeRequest(_image_input(pair.image_path, pair.bucket), caption, sources_of(pair), other)


def sources_of(pair: Pair) -> tuple[ImageInput, ...]:
    """The source images of an edit, cropped like its target."""
    return tuple(_image_input(path, pair.bucket) for path in pair.source_images)


def seen_images(pairs: Sequence[Pair], count: int, teacher_image: TeacherImage, background: Background) -> list[Tensor]:
    """What the teacher sees for the first `count` pairs, [3, H, W] in [0, 1] each; none if it sees whole images."""
    if background == "keep":
        return []
    seen = [shown_to_teacher(pairs, index, teacher_image)[0] for index in range(min(count, len(pairs)))]
    return [seen_by_teacher(pair, background).load() for pair in seen]


def seen_by_teacher(pair: Pair, background: Background) -> ImageInput:
    """The pair's image as the teacher sees it: the subject alone, where there is a mask."""
    whole, mask = _image_input(pair.image_path, pair.bucket), pair.mask
    if background == "keep" or mask is None:
        return whole
    digest = digest_bytes(mask.read_bytes())

    def load() -> Tensor:
        image = whole.load()
        try:
            subject = load_mask(mask, pair.image_path, pair.bucket)
        except ImageError as error:
            raise ImageError(printable(f"{mask}: {error}")) from error
        if digest_bytes(mask.read_bytes()) != digest:
            raise ImageError(printable(f"{mask} was changed while the dataset was being encoded: run again"))
        return subject_alone(image, subject, background)

    return ImageInput(whole.digest, load, {**whole.settings, "background": background, "mask": digest})


def _image_input(path: Path, bucket: Bucket) -> ImageInput:
    digest = digest_bytes(path.read_bytes())

    def load() -> Tensor:
        try:
            image = load_image(path, bucket)
        except ImageError as error:
            raise ImageError(printable(f"{path}: {error}")) from error
        if digest_bytes(path.read_bytes()) != digest:  # it would be cached under the old digest
            raise ImageError(printable(f"{path} was changed while the dataset was being encoded: run again"))
        return image

    return ImageInput(digest, load, {"bucket": [bucket.width, bucket.height]})
