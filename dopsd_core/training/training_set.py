"""The encoded training data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..conditioning.cache import ConditionCache
from ..conditioning.encode import (
    Condition,
    DualCondition,
    Encoder,
    EncodeRequest,
    OnEncoded,
    encode_captioned,
    encode_dataset,
)
from ..conditioning.teachers import VLM, TeacherView
from ..data.captions import put_trigger
from ..data.dataset import Pair
from ..data.encoding_plan import EncodingPlan, Example, plan_encoding
from ..data.resolutions import Scale
from ..data.triggers import concepts_of, require_names
from ..families import Family
from ..objectives import ClassImage
from .anchors import anchor_tokens, encode_anchors, ordinary_prompts, own_anchors, weighted, with_sources
from .scales import ScaleShare
from .set_facts import MostTokens, most_of, tuple_in_parts
from .shown_images import (
    TeacherImage,
    encode_request,
    pair_of_prompt,
    require_masks,
    require_others,
    shown_to_teacher,
)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Encoded pairs and how they are sampled.

    Attributes:
        pairs: every (image, caption) with both conditions and a target latent [C, h, w].
        anchors: conditions [L, D] of captions without the concept, for the prior anchor.
        regularisation: ordinary images with their captions, latents [C, h, w]; the class images of some objectives.
        heldout: a training image with a caption that is not trained on, for the probe.
        examples: which pairs belong to the same image (`plan_encoding`); by default each pair is an example.
        scales: the examples of each resolution, if there are several; they follow each other.

    Raises:
        ValueError: there are no pairs, a pair has no target latent, or an example does not fit.
    """

    pairs: Sequence[DualCondition]
    anchors: Sequence[Condition] = ()
    heldout: DualCondition | None = None
    examples: Sequence[Example] = ()
    regularisation: Sequence[ClassImage] = ()
    scales: tuple[ScaleShare, ...] = ()

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

    def repeats(self) -> tuple[int, ...]:
        """Visits per epoch of each example."""
        return tuple(example.repeats for example in self.examples)

    def sample(self) -> Sequence[DualCondition]:
        """Pairs that show of which kinds there are: all of them, or some of a dataset whose pairs are of one kind."""
        return self.pairs

    def most_tokens(self, family: Family) -> MostTokens:
        """The largest numbers of tokens of a forward."""
        students = [family.tokens(latent_shape(pair), pair.student) for pair in self.pairs]
        students += anchor_tokens(family, self.anchors, self.shapes())
        teachers = [family.tokens(latent_shape(pair), pair.teacher) for pair in self.pairs]
        return MostTokens(most_of(students), most_of(teachers))

    def fingerprint(self) -> str:
        """A digest of pairs, anchors, examples and regularisation images in order; without the held-out pair, which is
        not trained on."""
        digest = hashlib.sha256()
        for key, caption, shape in self._described():
            digest.update(f"{key}|{caption}|{shape}\n".encode())
        for anchor in self.anchors:
            digest.update(f"{tuple(anchor.features.shape)}\n".encode())
            for tensor in (anchor.features, *anchor.reference_latents):
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        for image in self.regularisation:
            for tensor in (image.condition.features, image.latent):
                digest.update(f"{tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        for text in tuple_in_parts(len(self.pairs), len(self.anchors), self.examples):
            digest.update(text.encode())
        if self.scales:
            digest.update(repr(self.scales).encode())
        return digest.hexdigest()

    def keys(self) -> Iterator[str]:
        """The key of every pair, in order."""
        return (key for key, _, _ in self._described())

    def _described(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(key, caption, latent shape) of every pair, in order."""
        return ((pair.key, pair.caption, latent_shape(pair)) for pair in self.pairs)


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
    scales: Sequence[Scale] = (),
    on_encoded: OnEncoded | None = None,
) -> TrainingSet:
    """Encodes a dataset, or loads it from the cache; the encoder can be unloaded afterwards.

    Args:
        pairs: the pairs of a `DatasetReport` without errors; each image once (`resolutions.every_image`).
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
        scales: the same images at several resolutions, the largest first.
        on_encoded: called after each request.

    Raises:
        ValueError: the pairs do not fit the teacher, `heldout_caption` is trained on, the encoder returns invalid
            values, or a prompt contains `[V]` where it may stand for several concepts.
        ImageError: an image was changed or damaged after it was checked.
    """
    require_fit(pairs, teacher, teacher_image, empty_captions=caption_dropout, scales=scales)
    require_masks(pairs, teacher.background)
    _require_names(pairs, teacher, anchor_prompts, heldout_caption)
    sizes = [scale.pairs for scale in scales] or [tuple(pairs)]
    plans = plan_requests(sizes, teacher, teacher_image, trigger, caption_dropout)
    requests = [request for planned in plans for request in planned.requests]
    if heldout_caption is not None:
        requests.append(_heldout_request(pairs, put_trigger(heldout_caption, trigger), plans, teacher, teacher_image))
    examples, shares = _joined(plans, scales)
    encoded = encode_dataset(requests, encoder, cache, on_encoded, teacher)
    prompts = ordinary_prompts(anchor_prompts, regularisation, trigger)
    wanted = weighted(own_anchors([planned.plan for planned in plans]), with_sources(prompts, sizes[0]))
    return TrainingSet(
        pairs=encoded[: sum(len(planned.requests) for planned in plans)],
        anchors=encode_anchors(wanted, encoder, cache) if anchors else (),
        heldout=encoded[-1] if heldout_caption is not None else None,
        examples=examples,
        regularisation=encode_regularisation(regularisation, encoder, cache, on_encoded),
        scales=shares,
    )


@dataclass(frozen=True)
class _Planned:
    """The requests for the images at one resolution: of each (pair, caption) of the plan some, `copies` by index."""

    plan: EncodingPlan
    requests: list[EncodeRequest]
    copies: list[range]

    def examples(self, offset: int) -> list[Example]:
        """The examples, with the indices of requests that follow `offset` others."""
        copies = [range(copy.start + offset, copy.stop + offset) for copy in self.copies]
        return [_drawing_copies(example, copies) for example in self.plan.examples]


def plan_requests(
    sizes: Sequence[Sequence[Pair]], teacher: TeacherView, teacher_image: TeacherImage, trigger: str, dropout: bool
) -> list[_Planned]:
    """A plan for the images of each resolution, of which each may lack some concepts."""
    concepts = concepts_of(pair.trigger for pairs in sizes for pair in pairs)
    plans = [plan_encoding(pairs, trigger=trigger, caption_dropout=dropout, concepts=concepts) for pairs in sizes]
    return [_requests_of(plan, pairs, teacher, teacher_image) for plan, pairs in zip(plans, sizes, strict=True)]


def _requests_of(
    plan: EncodingPlan, pairs: Sequence[Pair], teacher: TeacherView, teacher_image: TeacherImage
) -> _Planned:
    shown = {id(pair): shown_to_teacher(pairs, index, teacher_image) for index, pair in enumerate(pairs)}
    requests, copies = [], []
    for pair, text in plan.requests:
        copies.append(range(len(requests), len(requests) + len(shown[id(pair)])))
        requests += [encode_request(pair, text, other, teacher.background) for other in shown[id(pair)]]
    return _Planned(plan, requests, copies)


def _heldout_request(
    pairs: Sequence[Pair], text: str, plans: Sequence[_Planned], teacher: TeacherView, teacher_image: TeacherImage
) -> EncodeRequest:
    """The request for the held-out caption, with the first image of its concept."""
    if any(text == caption for planned in plans for _, caption in planned.plan.requests):
        raise ValueError(f"the held-out caption {text!r} is in the dataset; use one that is not trained on")
    if teacher.sees == "nothing":
        _require_words([text], "held-out caption", teacher)
    first = pair_of_prompt(pairs, text, 0)
    other = shown_to_teacher(pairs, first, teacher_image)[0]
    return encode_request(pairs[first], text, other, teacher.background)


def _joined(plans: Sequence[_Planned], scales: Sequence[Scale]) -> tuple[tuple[Example, ...], tuple[ScaleShare, ...]]:
    """(the examples of all resolutions, which of them are of which resolution; none for one resolution)."""
    examples: list[Example] = []
    shares, offset = [], 0
    for number, planned in enumerate(plans):
        first = len(examples)
        examples += planned.examples(offset)
        offset += len(planned.requests)
        if len(scales) > 1:
            scale = scales[number]
            shares.append(ScaleShare(scale.share, first, len(examples), scale.side**2))
    return tuple(examples), tuple(shares)


def _require_names(
    pairs: Sequence[Pair], teacher: TeacherView, anchor_prompts: Sequence[str], heldout_caption: str | None
) -> None:
    concepts = concepts_of(pair.trigger for pair in pairs)
    require_names(anchor_prompts, "anchor prompt", concepts)
    require_names([heldout_caption or ""], "held-out caption", concepts)
    require_names([teacher.sentence], "teacher_sentence", concepts)


def encode_regularisation(
    pairs: Sequence[Pair], encoder: Encoder, cache: ConditionCache | None, on_encoded: OnEncoded | None = None
) -> tuple[ClassImage, ...]:
    """Each image with each of its captions, as often as it repeats: conditions [L, D], latents [C, h, w]."""
    drawn = [(pair, caption) for pair in pairs for caption in dict.fromkeys(pair.captions)]
    requests = [encode_request(pair, caption) for pair, caption in drawn]
    images = [ClassImage(*encoded) for encoded in encode_captioned(requests, encoder, cache, on_encoded)]
    return tuple(image for image, (pair, _) in zip(images, drawn, strict=True) for _ in range(pair.repeats))


def require_fit(
    pairs: Sequence[Pair],
    teacher: TeacherView,
    teacher_image: TeacherImage = "own",
    *,
    empty_captions: bool = False,
    scales: Sequence[Scale] = (),
) -> None:
    """Checks that the pairs are what the teacher needs, apart from masks (`require_masks`).

    Args:
        pairs: each image once.
        teacher: the teacher's view of the target.
        teacher_image: whether it sees the pair's own target or others.
        empty_captions: whether the empty caption is trained too.
        scales: the same images at several resolutions, if there are several.

    Raises:
        ValueError: they are not; the message says what to change.
    """
    if teacher.sees == "nothing":
        _require_words([caption for pair in pairs for caption in pair.captions], "caption", teacher, teacher_image)
        if empty_captions and not teacher.teaches(""):
            raise ValueError(
                f"an empty caption has no words that the teacher {teacher.name} replaces: set caption_dropout to 0, "
                "and for shards leave out --empty-captions"
            )
    lacking = sum(not pair.source_images for pair in pairs)
    if teacher.edits and lacking:
        raise ValueError(
            f"the teacher {teacher.name} is for edits, but {lacking} of {len(pairs)} images have no source: use a "
            "folder with source/ and target/, or a .jsonl with ref_img and target_img"
        )
    if not teacher.edits and lacking < len(pairs):
        raise ValueError(
            f"the dataset has source images, which the teacher {teacher.name} does not use: choose edit_target, if "
            "the model has it, or load only the folder of the targets"
        )
    if teacher_image == "other" and teacher.edits:
        raise ValueError("an edit has only one target: set teacher_image to own for the teacher edit_target")
    if teacher_image == "other":
        require_others(pairs, scales)


def _require_words(texts: Sequence[str], what: str, teacher: TeacherView, teacher_image: TeacherImage = "own") -> None:
    if teacher_image == "other":
        raise ValueError(f"the teacher {teacher.name} sees no image: set teacher_image to own")
    if equal := [text for text in texts if not teacher.teaches(text)]:
        words = teacher.replaces[0] if teacher.replaces else ""
        raise ValueError(
            f"the {what} {equal[0]!r} does not contain {words!r}, in whose place the teacher reads other words "
            f"({teacher.sentence!r}): write it there, or change teacher_sentence"
        )


def _drawing_copies(example: Example, copies: Sequence[Sequence[int]]) -> Example:
    """Replaces each pair of the example by its copies, which differ in the image that the teacher sees."""
    variants = tuple(copy for index in example.variants for copy in copies[index])
    return replace(example, variants=variants, dropped=None if example.dropped is None else copies[example.dropped][0])


def latent_shape(pair: DualCondition) -> tuple[int, ...]:
    """(C, h, w) of the pair's target latent."""
    if pair.target_latent is None:
        raise ValueError(f"the pair {pair.caption!r} has no target latent")
    return tuple(pair.target_latent.shape)


def pair_to(pair: DualCondition, device: torch.device) -> DualCondition:
    """The pair with its conditions [L, D] on a device; shares memory if nothing moves."""
    return DualCondition(pair.student.to(device), pair.teacher.to(device), pair.target_latent, pair.caption, pair.key)
