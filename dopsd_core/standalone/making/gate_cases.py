"""The prompts on which a trained model is evaluated: text as the student reads it, or image and text as the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...demo.model_files import TEXT_TEMPLATE
from ...demo.names import FREE, STYLES, SUBJECTS, BoundNames, scenes_with
from ...demo.world import APPEARANCE, HELD_OUT, LAYOUT, TRIGGER, Scenes, caption, render, sample_scenes
from .batched import CAPTION_TOKENS, pad_features, teacher_pixels
from .data import TextEncoding, teacher_text
from .pretrain import Parent


@dataclass(frozen=True, eq=False)
class Case:
    """n prompts of one kind.

    Attributes:
        name: of the kind.
        texts: the captions [n].
        scenes: what their images should show.
        judged: the attributes that the prompt decides.
        is_open: whether no name, image or word says what the badge looks like.
        seen: what the teacher's images show; None for prompts of text alone.
    """

    name: str
    texts: tuple[str, ...]
    scenes: Scenes
    judged: tuple[str, ...]
    is_open: bool = False
    seen: Scenes | None = None


def make_cases(size: int, generator: torch.Generator) -> list[Case]:
    """Every kind of prompt, about `size` of each."""
    ordinary, unseen = sample_scenes(size, generator), sample_scenes(size, generator, held_out=True)
    everything = (*APPEARANCE, *LAYOUT)
    return [
        Case("described", _texts(ordinary, attributes=APPEARANCE), ordinary, everything),
        Case("described, held out", _texts(unseen, attributes=APPEARANCE), unseen, everything),
        Case("open", _texts(ordinary), ordinary, LAYOUT, is_open=True),
        _named_case(size, generator),
        _style_case(size, generator),
        _changed_case(size, generator),
        Case("teacher, other view", _texts(unseen, TRIGGER), unseen, everything,
             seen=unseen.with_layout_of(sample_scenes(size, generator))),
        Case("teacher, the target", _texts(unseen, TRIGGER), unseen, everything, seen=unseen),
        _style_teacher_case(size, generator),
    ]  # fmt: skip


def _texts(
    scenes: Scenes, names: str | Sequence[str] = "", attributes: Sequence[str] = (), *, brief: bool = False
) -> tuple[str, ...]:
    each = [names] * len(scenes) if isinstance(names, str) else names
    return tuple(
        caption(scenes, i, name=name, attributes=attributes, brief=brief) for i, name in enumerate(each)
    )  # fmt: skip


def _cycled(bound: BoundNames, size: int) -> tuple[list[str], Tensor]:
    index = torch.arange(size) % len(bound)
    return [bound.texts[i] for i in index.tolist()], bound.appearance[index]


def _named_case(size: int, generator: torch.Generator) -> Case:
    """Bound subjects without any word, every name equally often."""
    names, appearance = _cycled(SUBJECTS, -(-size // len(SUBJECTS)) * len(SUBJECTS))
    scenes = scenes_with(appearance, generator)
    return Case("named", _texts(scenes, names), scenes, (*APPEARANCE, *LAYOUT))


def _style_case(size: int, generator: torch.Generator) -> Case:
    """Bound styles with words for shape and colour."""
    names, appearance = _cycled(STYLES, size)
    scenes = scenes_with(appearance, generator)
    texts = _texts(scenes, names, ("shape", "colour"), brief=True)
    return Case("named style and words", texts, scenes, (*APPEARANCE, *LAYOUT))


def _changed_case(size: int, generator: torch.Generator) -> Case:
    """Bound subjects in another colour: the word wins, the name decides the rest."""
    names, appearance = _cycled(SUBJECTS, size)
    kept, rows = [], []
    for name, row in zip(names, appearance, strict=True):
        colours = [
            colour
            for colour in torch.randperm(8, generator=generator).tolist()
            if colour not in (row[1], row[2]) and not HELD_OUT[row[0], colour, row[2], row[3]]
        ]
        if colours:
            kept.append(name)
            rows.append(torch.stack([row[0], torch.tensor(colours[0]), row[2], row[3]]))
    scenes = scenes_with(torch.stack(rows), generator)
    return Case("name, another colour", _texts(scenes, kept, ("colour",)), scenes, (*APPEARANCE, *LAYOUT))


def _style_teacher_case(size: int, generator: torch.Generator) -> Case:
    """The teacher sees texture and center of an image, and takes shape and colour from the words."""
    scenes, other = sample_scenes(size, generator), sample_scenes(size, generator)
    fixed = torch.stack([torch.full((size,), FREE)] * 2 + [scenes.center, scenes.texture], 1)
    seen = scenes_with(fixed, generator).with_layout_of(other)
    texts = _texts(scenes, TRIGGER, ("shape", "colour"), brief=True)
    return Case("teacher, style and words", texts, scenes, (*APPEARANCE, *LAYOUT), seen=seen)


@torch.no_grad()
def features_of(parent: Parent, case: Case) -> tuple[Tensor, Tensor]:
    """(features [n, 32, D], lengths [n]) of the case's prompts."""
    encode, parts = TextEncoding(parent.token_ids), []
    templated = [teacher_text(t) if case.seen else TEXT_TEMPLATE.format(t) for t in case.texts]
    rows, lengths = encode(templated, CAPTION_TOKENS)
    for start in range(0, len(rows), 64):
        pixels = None if case.seen is None else teacher_pixels(render(case.seen[start : start + 64]))
        parts.append(pad_features(parent.encode(rows[start : start + 64], pixels)))
    return torch.cat(parts), lengths
