"""Prior anchors: prompts without the concept, whose images should not change.

Captions without the concept's name, other prompts, and the captions of regularisation images. Where the training images
are edits, instructions are anchors with source images, so that other edits stay as they are; prompts alone keep those
only in part (benchmarks/edits.py).

Legend: L tokens, D features, C h w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..conditioning.cache import ConditionCache
from ..conditioning.encode import Condition, Encoder, ImageInput, encode_texts
from ..data.captions import put_trigger
from ..data.dataset import Pair
from ..data.encoding_plan import EncodingPlan
from ..families import Family
from .shown_images import sources_of

STRIPPED_SHARE = 0.75
"""Share of captions without the concept's name among the prior anchors, if there are other prompts too."""


@dataclass(frozen=True)
class Anchor:
    """A prior anchor.

    Attributes:
        text: the prompt, or the instruction.
        sources: the images that it edits; empty for a prompt alone.
    """

    text: str
    sources: tuple[ImageInput, ...] = ()

    @property
    def key(self) -> str:
        """Equal for equal anchors: the text, with the digests of source images."""
        return "|".join((self.text, *(image.digest for image in self.sources)))


def ordinary_prompts(anchor_prompts: Sequence[str], regularisation: Sequence[Pair], trigger: str) -> list[str]:
    """The prompts for the prior anchors that are not of the dataset."""
    ordinary = dict.fromkeys(caption for pair in regularisation for caption in pair.captions)
    return [*(put_trigger(prompt, trigger) for prompt in anchor_prompts), *ordinary]


def own_anchors(plans: Sequence[EncodingPlan]) -> list[Anchor]:
    """The dataset's captions without the concept's name, and its instructions, with sources at the first resolution."""
    alone = dict.fromkeys(text for plan in plans for text in plan.anchors)
    edits = plans[0].edit_anchors if plans else ()
    found = [*map(Anchor, alone), *(Anchor(text, sources_of(pair)) for pair, text in edits)]
    return list({anchor.key: anchor for anchor in found}.values())


def with_sources(prompts: Sequence[str], pairs: Sequence[Pair]) -> list[Anchor]:
    """Each prompt alone; where the pairs are edits also as an instruction, for their sources in turn."""
    edits = [pair for pair in pairs if pair.source_images]
    edited = [Anchor(text, sources_of(edits[n % len(edits)])) for n, text in enumerate(prompts)] if edits else []
    return [*map(Anchor, prompts), *edited]


def weighted(stripped: Sequence[Anchor], prompts: Sequence[Anchor]) -> list[Anchor]:
    """Captions without the concept's name, repeated to about `STRIPPED_SHARE` of all, and other ordinary prompts.

    These captions differ from the training captions only by the name, so leakage is strongest there.
    """
    return [*list(stripped) * stripped_repeats(len(stripped), len(prompts)), *prompts]


def stripped_repeats(stripped: int, prompts: int) -> int:
    """How often each caption without the concept's name is among the anchors, by the numbers of both kinds."""
    return max(1, round(prompts * STRIPPED_SHARE / (1 - STRIPPED_SHARE) / stripped)) if stripped and prompts else 1


def encode_anchors(anchors: Sequence[Anchor], encoder: Encoder, cache: ConditionCache | None) -> list[Condition]:
    """The conditions on the CPU, features [L, D] and latents [C, h, w] of the sources; equal anchors share theirs."""
    texts, sources = [anchor.text for anchor in anchors], [anchor.sources for anchor in anchors]
    return encode_texts(texts, encoder, cache, sources=sources)


def anchor_tokens(
    family: Family, anchors: Sequence[Condition], shapes: Sequence[tuple[int, ...]]
) -> list[tuple[int, int]]:
    """The largest (image, text) tokens of a forward on each anchor; shapes: the latents [C, h, w] that are trained.

    The image's own tokens are counted for anchors with references only: the pairs have them too.
    """
    image = max(family.image_tokens(*shape[-2:]) for shape in shapes)
    counted = [family.tokens((0, 0, 0), anchor) for anchor in anchors]
    return [(image + references if references else 0, text) for references, text in counted]
