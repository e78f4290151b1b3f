"""The encoded training data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..conditioning.cache import ConditionCache, digest_bytes
from ..conditioning.encode import (
    Condition,
    DualCondition,
    Encoder,
    EncodeRequest,
    ImageInput,
    OnEncoded,
    encode_captioned,
    encode_dataset,
    encode_texts,
)
from ..conditioning.teachers import VLM, Background, TeacherView
from ..data.buckets import Bucket
from ..data.captions import put_trigger
from ..data.dataset import Example, Pair, plan_encoding
from ..data.images import ImageError, load_image
from ..data.masks import load_mask, subject_alone
from ..data.triggers import concepts_of, names_concept, require_names
from ..objectives import ClassImage
from ..text import printable

TeacherImage = Literal["own", "other"]
"""Which image the teacher sees: the pair's own, or other images of the concept, which cannot be copied."""

MAX_OTHERS = 3
"""Number of other images from which one is sampled per visit."""

STRIPPED_SHARE = 0.75
"""Share of captions without the concept's name among the prior anchors, if there are other prompts too."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Encoded pairs and how they are sampled.

    Attributes:
        pairs: every (image, caption) with both conditions and a target latent [C, h, w].
        anchors: conditions [L, D] of captions without the concept, for the prior anchor.
        regularisation: ordinary images with their captions, latents [C, h, w]; the class images of some objectives.
        heldout: a training image with a caption that is not trained on, for the probe.
        examples: which pairs belong to the same image (`plan_encoding`); by default each pair is an example.

    Raises:
        ValueError: there are no pairs, a pair has no target latent, or an example does not fit.
    """

    pairs: Sequence[DualCondition]
    anchors: Sequence[Condition] = ()
    heldout: DualCondition | None = None
    examples: Sequence[Example] = ()
    regularisation: Sequence[ClassImage] = ()

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("the training set has no pairs; give at least one image with a caption")
        for pair in (*self.pairs, *((self.heldout,) if self.heldout else ())):
            if pair.target_latent is None:
                raise ValueError(f"the pair {pair.caption!r} has no target latent, which gives the noise its shape")
        if not self.examples:
            object.__setattr__(self, "examples", tuple(Example((index,)) for index in range(len(self.pairs))))
        for number, example in enumerate(self.examples):
            self._check_example(number, example)

    def _check_example(self, number: int, example: Example) -> None:
        used = {*example.variants, *(() if example.dropped is None else (example.dropped,))}
        if not example.variants or not all(0 <= index < len(self.pairs) for index in used) or example.repeats < 1:
            raise ValueError(f"example {number} ({example}) does not fit the {len(self.pairs)} pairs")
        if len({latent_shape(self.pairs[index]) for index in used}) > 1:
            raise ValueError(f"the captions of example {number} belong to images of different sizes")

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The latent shape of each example."""
        return tuple(latent_shape(self.pairs[example.variants[0]]) for example in self.examples)

    def fingerprint(self) -> str:
        """A digest of pairs, anchors, examples and regularisation images in order; without the held-out pair, which is
        not trained on."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(f"{pair.key}|{pair.caption}|{latent_shape(pair)}\n".encode())
        for anchor in self.anchors:
            digest.update(f"{tuple(anchor.features.shape)}\n".encode())
            digest.update(anchor.features.detach().cpu().float().contiguous().numpy().tobytes())
        for image in self.regularisation:
            for tensor in (image.condition.features, image.latent):
                digest.update(f"{tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        digest.update(repr((len(self.pairs), len(self.anchors), tuple(self.examples))).encode())
        return digest.hexdigest()


def build_training_set(
    pairs: Sequence[Pair],
    encoder: Encoder,
    cache: ConditionCache | None = None,
    *,
    teacher: TeacherView = VLM,
    teacher_image: TeacherImage = "own",
    trigger: str = "",
    caption_dropout: bool = False,
    anchors: bool = False,
    anchor_prompts: Sequence[str] = (),
    regularisation: Sequence[Pair] = (),
    heldout_caption: str | None = None,
    on_encoded: OnEncoded | None = None,
) -> TrainingSet:
    """Encodes a dataset, or loads it from the cache; the encoder can be unloaded afterwards.

    Args:
        pairs: the pairs of a `DatasetReport` without errors.
        encoder: the host's encoder.
        cache: cache of encoded parts.
        teacher: the teacher's view of the target; one that edits needs pairs with source images, others without.
        teacher_image: whether it sees the pair's own target or up to `MAX_OTHERS` others.
        trigger: as in `read_dataset`; removed from the captions for the anchors.
        caption_dropout: whether to encode the empty caption too.
        anchors: whether to encode captions without the concept, for the prior anchor.
        anchor_prompts: further ordinary prompts for the prior anchor; `[V]` stands for the trigger.
        regularisation: ordinary images; their captions are anchors too, with the images for some objectives.
        heldout_caption: a caption that is not in the data, for the first image of its concept; `[V]` stands for the
            trigger.
        on_encoded: called after each request.

    Raises:
        ValueError: the pairs do not fit the teacher, `heldout_caption` is trained on, the encoder returns invalid
            values, or a prompt contains `[V]` where it may stand for several concepts.
        ImageError: an image was changed or damaged after it was checked.
    """
    _require_fit(pairs, teacher, teacher_image)
    _require_names(pairs, teacher, anchor_prompts, heldout_caption)
    plan = plan_encoding(pairs, trigger=trigger, caption_dropout=caption_dropout)
    view = teacher.background
    shown = {id(pair): shown_to_teacher(pairs, index, teacher_image) for index, pair in enumerate(pairs)}
    requests, copies = [], []
    for pair, text in plan.requests:
        copies.append(range(len(requests), len(requests) + len(shown[id(pair)])))
        requests += [encode_request(pair, text, other, view) for other in shown[id(pair)]]
    if heldout_caption is not None:
        text = put_trigger(heldout_caption, trigger)
        if any(text == caption for _, caption in plan.requests):
            raise ValueError(f"the held-out caption {text!r} is in the dataset; use one that is not trained on")
        first = pairs[pair_of_prompt(pairs, text, 0)]
        requests.append(encode_request(first, text, shown[id(first)][0], view))
    encoded = encode_dataset(requests, encoder, cache, on_encoded, teacher)
    ordinary = dict.fromkeys(caption for pair in regularisation for caption in pair.captions)
    prompts = [*(put_trigger(prompt, trigger) for prompt in anchor_prompts), *ordinary]
    return TrainingSet(
        pairs=encoded[: sum(map(len, copies))],
        anchors=encode_texts(_weighted_anchors(plan.anchors, prompts), encoder, cache) if anchors else (),
        heldout=encoded[-1] if heldout_caption is not None else None,
        examples=tuple(_drawing_copies(example, copies) for example in plan.examples),
        regularisation=_encoded_images(regularisation, encoder, cache, on_encoded),
    )


def _require_names(
    pairs: Sequence[Pair], teacher: TeacherView, anchor_prompts: Sequence[str], heldout_caption: str | None
) -> None:
    concepts = concepts_of(pair.trigger for pair in pairs)
    require_names(anchor_prompts, "anchor prompt", concepts)
    require_names([heldout_caption or ""], "held-out caption", concepts)
    require_names([teacher.sentence], "teacher_sentence", concepts)


def _encoded_images(
    pairs: Sequence[Pair], encoder: Encoder, cache: ConditionCache | None, on_encoded: OnEncoded | None
) -> tuple[ClassImage, ...]:
    """Each image with each of its captions, as often as it repeats."""
    drawn = [(pair, caption) for pair in pairs for caption in dict.fromkeys(pair.captions)]
    requests = [encode_request(pair, caption) for pair, caption in drawn]
    images = [ClassImage(*encoded) for encoded in encode_captioned(requests, encoder, cache, on_encoded)]
    return tuple(image for image, (pair, _) in zip(images, drawn, strict=True) for _ in range(pair.repeats))


def _require_fit(pairs: Sequence[Pair], teacher: TeacherView, teacher_image: TeacherImage) -> None:
    lacking = sum(not pair.source_images for pair in pairs)
    if teacher.edits and lacking:
        raise ValueError(
            f"the teacher {teacher.name} is for edits, but {lacking} of {len(pairs)} images have no source: use a "
            "folder with source/ and target/, or a .jsonl with ref_img and target_img"
        )
    if not teacher.edits and lacking < len(pairs):
        raise ValueError(
            f"the dataset has source images, which the teacher {teacher.name} does not use: choose edit_target, or "
            "load only the folder of the targets"
        )
    if teacher_image == "other" and teacher.edits:
        raise ValueError("an edit has only one target: set teacher_image to own for the teacher edit_target")
    require_masks(pairs, teacher.background)
    names = [pair.trigger.casefold() for pair in pairs]
    if teacher_image == "other" and (alone := [pair for pair in pairs if names.count(pair.trigger.casefold()) < 2]):
        of_it = f" of {alone[0].trigger}" if len(set(names)) > 1 else ""
        raise ValueError(f"teacher_image other needs at least two images{of_it}; add some, or set it to own")


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
    fitting = [index for index, pair in enumerate(pairs) if not named or pair.trigger.casefold() == named[0]]
    return fitting[number % len(fitting)]


def _drawing_copies(example: Example, copies: Sequence[Sequence[int]]) -> Example:
    """Replaces each pair of the example by its copies, which differ in the image that the teacher sees."""
    variants = tuple(copy for index in example.variants for copy in copies[index])
    return replace(example, variants=variants, dropped=None if example.dropped is None else copies[example.dropped][0])


def _weighted_anchors(stripped: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Captions without the concept's name, repeated to about `STRIPPED_SHARE` of all, and other ordinary prompts.

    These captions differ from the training captions only by the name, so leakage is strongest there.
    """
    if not stripped or not prompts:
        return [*stripped, *prompts]
    repeats = max(1, round(len(prompts) * STRIPPED_SHARE / (1 - STRIPPED_SHARE) / len(stripped)))
    return [*list(stripped) * repeats, *prompts]


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
    sources = tuple(_image_input(path, pair.bucket) for path in pair.source_images)
    seen, is_whole = shown or pair, background == "keep" or (shown or pair).mask is None
    other = None if seen is pair and is_whole else seen_by_teacher(seen, background)
    return EncodeRequest(_image_input(pair.image_path, pair.bucket), caption, sources, other)


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


def latent_shape(pair: DualCondition) -> tuple[int, ...]:
    """(C, h, w) of the pair's target latent."""
    if pair.target_latent is None:
        raise ValueError(f"the pair {pair.caption!r} has no target latent")
    return tuple(pair.target_latent.shape)


def pair_to(pair: DualCondition, device: torch.device) -> DualCondition:
    """The pair with its conditions [L, D] on a device; shares memory if nothing moves."""
    return DualCondition(pair.student.to(device), pair.teacher.to(device), pair.target_latent, pair.caption, pair.key)
