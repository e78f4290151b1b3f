"""What to encode of a dataset before training, and how its examples refer to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .captions import has_trigger
from .dataset import Pair
from .triggers import concepts_of, without_names


@dataclass(frozen=True)
class Example:
    """One image as the trainer samples it: indices into the list of conditions.

    Attributes:
        variants: one condition per caption; one is sampled per visit. Indices may repeat.
        dropped: the condition with the empty caption, if caption dropout is used.
        repeats: visits per epoch.
        concept: the trigger of its concept, if there are several; else "". No part of a run's identity: it is in the
            captions.
    """

    variants: tuple[int, ...]
    dropped: int | None = None
    repeats: int = 1
    concept: str = field(default="", repr=False)


@dataclass(frozen=True)
class EncodingPlan:
    """What to encode before training, and how examples refer to it.

    Attributes:
        requests: (pair, caption) to encode.
        examples: one per image, with indices into `requests`.
        anchors: captions without the concept's name, for the prior anchor. Captions that do not name the concept give
            none: the same text would be trained towards both the base and the concept.
        edit_anchors: the same of edits, with the pair whose source images the instruction needs.
    """

    requests: tuple[tuple[Pair, str], ...]
    examples: tuple[Example, ...]
    anchors: tuple[str, ...]
    edit_anchors: tuple[tuple[Pair, str], ...] = ()


def plan_encoding(
    pairs: Sequence[Pair], *, trigger: str = "", caption_dropout: bool = False, concepts: Sequence[str] = ()
) -> EncodingPlan:
    """Plans one request for each image and distinct caption, plus the empty caption for dropout.

    concepts: the triggers of the dataset, if the pairs are only some of it.
    """
    requests: list[tuple[Pair, str]] = []
    examples: list[Example] = []
    concepts = concepts_of((*concepts, *(pair.trigger for pair in pairs)))
    for pair in pairs:
        texts = list(dict.fromkeys(pair.captions)) + [""] * caption_dropout
        index = {text: len(requests) + offset for offset, text in enumerate(texts)}
        requests += [(pair, text) for text in texts]
        variants, concept = tuple(index[text] for text in pair.captions), pair.trigger if len(concepts) > 1 else ""
        examples.append(Example(variants, index.get(""), pair.repeats, concept))
    named = [(pair, text) for pair in pairs for text in pair.captions if has_trigger(text, pair.trigger or trigger)]
    bare = [(pair, re.sub(r"\s+", " ", without_names(text, (trigger, *concepts)))) for pair, text in named]
    anchors = dict.fromkeys(text for pair, text in bare if text and not pair.source_images)
    edits = {(pair.source_images, text): (pair, text) for pair, text in bare if text and pair.source_images}
    return EncodingPlan(tuple(requests), tuple(examples), tuple(anchors), tuple(edits.values()))
