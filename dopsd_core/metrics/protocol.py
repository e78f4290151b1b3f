"""The paper's protocol (arXiv 2605.05204, section 4): which images are drawn, from which noise, compared with what."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..data.captions import PLACEHOLDER, has_trigger, put_trigger, remove_trigger
from ..data.dataset import Pair
from ..training.rng import derive_seed

AREA = 1024**2
"""Number of pixels of a generated image."""

MULTIPLE = 16
"""Width and height are multiples of it."""

ROWS_PER_CONCEPT = 4
"""At most so many images of a concept are scored."""

ShotKind = Literal["rewrite", "test", "ordinary"]
"""rewrite: describes its own source image, with the trigger; test: another scene, with the trigger; ordinary: without
the trigger."""


@dataclass(frozen=True)
class Row:
    """A source image and its prompts, `[V]` where the concept is named.

    Attributes:
        width: of the source in pixels.
        height: of the source in pixels.
        rewrite: the prompt that describes the source.
        tests: prompts of other scenes.
    """

    width: int
    height: int
    rewrite: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shot:
    """An image to draw.

    Attributes:
        kind: what the prompt is.
        prompt: the prompt that the model reads.
        scored: the prompt that CLIP-S and HPSv3 read: with the class name in place of the trigger.
        seed: of the noise, the same for every variant.
        width: in pixels.
        height: in pixels.
        row: number of the source image; None for an ordinary prompt.
    """

    kind: ShotKind
    prompt: str
    scored: str
    seed: int
    width: int
    height: int
    row: int | None = None


def generation_size(width: int, height: int, area: int = AREA, multiple: int = MULTIPLE) -> tuple[int, int]:
    """Width and height of a generated image: the source's aspect at about `area` pixels, rounded to `multiple`."""
    scale = math.sqrt(area / (width * height))
    wide, high = (max(multiple, round(side * scale / multiple) * multiple) for side in (width, height))
    return wide, high


def seed_of(seed: int, row: int, prompt: int) -> int:
    """The seed of the noise in 0..2^63-1: a function of the row and of the prompt's number within it."""
    return derive_seed(seed, "evaluate", row, prompt)


def with_class_name(prompt: str, class_name: str, trigger: str = "") -> str:
    """The prompt with `[V]`, or the trigger, replaced by the class name, which is not repeated: "[V] style" -> "anime
    style", "a [V] dog" -> "a dog". Without a class name it is removed."""
    name = class_name.strip()
    if not name:
        return remove_trigger(prompt, trigger)
    words = "|".join(re.escape(word) for word in (PLACEHOLDER, trigger) if word)
    pattern = rf"(?<!\w)(?:{words})(?!\w)(?:\s+{re.escape(name)}\b)?"
    return re.sub(pattern, lambda _: name, prompt, flags=re.IGNORECASE)


def split_prompts(prompts: Sequence[str], trigger: str = "") -> tuple[list[str], list[str]]:
    """(prompts of the concept, ordinary prompts): those that contain `[V]` or the trigger, and those that do not."""
    tests = [prompt for prompt in prompts if has_trigger(prompt, trigger)]
    return tests, [prompt for prompt in prompts if prompt not in tests]


def rows_of(pairs: Sequence[Pair], tests: Sequence[str]) -> list[Row]:
    """The first `ROWS_PER_CONCEPT` images of a dataset, each with its first caption; the test prompts in turn."""
    chosen = pairs[:ROWS_PER_CONCEPT]
    return [
        Row(pair.width, pair.height, pair.captions[0], tuple(tests[number :: len(chosen)]))
        for number, pair in enumerate(chosen)
    ]


def concept_shots(
    rows: Sequence[Row], trigger: str, class_name: str, seed: int = 0, area: int = AREA, multiple: int = MULTIPLE
) -> list[Shot]:
    """Per row one image of the rewrite prompt and one of each test prompt, for at most `ROWS_PER_CONCEPT` rows."""
    shots = []
    for number, row in enumerate(rows[:ROWS_PER_CONCEPT]):
        width, height = generation_size(row.width, row.height, area, multiple)
        for index, prompt in enumerate((row.rewrite, *row.tests)):
            kind: ShotKind = "test" if index else "rewrite"
            read, scored = put_trigger(prompt, trigger), with_class_name(prompt, class_name, trigger)
            shots.append(Shot(kind, read, scored, seed_of(seed, number, index), width, height, number))
    return shots


def ordinary_shots(prompts: Sequence[str], width: int, height: int, seed: int = 0) -> list[Shot]:
    """One image of width x height pixels per ordinary prompt, for retention."""
    return [
        Shot("ordinary", prompt, prompt, seed_of(seed, -1, index), width, height)
        for index, prompt in enumerate(prompts)
    ]


def all_shots(
    pairs: Sequence[Pair],
    prompts: Sequence[str],
    trigger: str,
    class_name: str = "",
    *,
    seed: int = 0,
    num_seeds: int = 1,
    area: int = AREA,
    multiple: int = MULTIPLE,
) -> list[Shot]:
    """Everything that an evaluation draws.

    Args:
        pairs: the dataset; edits are not evaluated.
        prompts: with `[V]` or the trigger for test prompts, without it for ordinary ones.
        trigger: the concept's name; "" for `[V]` itself.
        class_name: what the concept is, such as "dog".
        num_seeds: images per prompt.
        area: number of pixels of an image.
        multiple: width and height are multiples of it.
    """
    tests, ordinary = split_prompts(prompts, trigger)
    rows, (width, height) = rows_of(pairs, tests), generation_size(1, 1, area, multiple)
    shots = []
    for each in range(seed, seed + num_seeds):
        shots += concept_shots(rows, trigger, class_name, each, area, multiple)
        shots += ordinary_shots([put_trigger(text, "") for text in ordinary], width, height, each)
    return shots
