"""An unseen concept of the demo world, a subject or a style: its training images as ordinary files, and the prompts to
evaluate it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.captions import PLACEHOLDER
from ..image_grid import to_images
from ..training.rng import make_generator
from .names import FREE, STYLES, SUBJECTS, scenes_with
from .world import (
    APPEARANCE,
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    TEXTURES,
    TRIGGER,
    Scenes,
    caption,
    render,
    sample_scenes,
)

NUM_TARGETS = 4


@dataclass(frozen=True)
class Prompts:
    """n prompts with n matching scenes (with any value of what the prompt does not say).

    Attributes:
        texts: the prompts.
        scenes: the scenes that they describe.
    """

    texts: tuple[str, ...]
    scenes: Scenes


@dataclass(frozen=True)
class Concept:
    """What the trigger names: a held-out appearance, or a style, whose texture and center no bound name has.

    Attributes:
        seed: selects the concept.
        decided: the attributes that the concept decides; for a style texture and center.
        worded: the attributes that its captions and prompts say; none for a subject, shape and colour for a style.
        targets: the training scenes.
        unseen: prompts with the trigger, on backgrounds that no target has.
        described: prompts without the trigger that describe some other, ordinary appearance in full.
        generic: open prompts, without the trigger and without any word for the appearance.
        named: prompts with a bound name alone.
        anchors: other ordinary prompts, half of them described, half of them with a bound name.
    """

    seed: int
    decided: tuple[str, ...]
    worded: tuple[str, ...]
    targets: Scenes
    unseen: Prompts
    described: Prompts
    generic: Prompts
    named: Prompts
    anchors: tuple[str, ...]

    @property
    def words(self) -> str:
        """The concept's looks for people to read, in words that do not occur in the training captions.

        Unlike in prompts, on whose words the models are trained, "a" is "an" before a vowel.
        """
        return re.sub(r"\ba (?=[aeiou])", "an ", caption(self.targets, 0, attributes=self.decided, layout=False))


def make_concept(
    seed: int, *, style: bool = False, num_unseen: int = 60, num_prior: int = 64, num_anchors: int = 16
) -> Concept:
    """The concept of a seed, equal on every machine."""
    generator = make_generator(seed, "demo concept")
    appearance = sample_scenes(1, generator, held_out=True)
    layout = sample_scenes(NUM_TARGETS, generator)
    positions = torch.randperm(len(POSITIONS), generator=generator)
    backgrounds = torch.randperm(len(BACKGROUNDS), generator=generator)
    layout = _at(layout, positions[:NUM_TARGETS], backgrounds[:NUM_TARGETS])
    new, step = backgrounds[NUM_TARGETS:], torch.arange(num_unseen)
    test = sample_scenes(num_unseen, generator)
    test = _at(test, positions[step % len(positions)], new[(step // len(positions)) % len(new)])
    described, generic = sample_scenes(num_prior, generator), sample_scenes(num_prior, generator)
    decided, worded = (("center", "texture"), ("shape", "colour")) if style else (APPEARANCE, ())
    shown = _style_scenes(seed, NUM_TARGETS + num_unseen) if style else appearance.repeat(NUM_TARGETS + num_unseen)
    targets, unseen = shown[:NUM_TARGETS].with_layout_of(layout), shown[NUM_TARGETS:].with_layout_of(test)
    return Concept(
        seed, decided, worded, targets, Prompts(_captions(unseen, TRIGGER, worded), unseen),
        Prompts(_captions(described, "", APPEARANCE), described), Prompts(_captions(generic, "", ()), generic),
        _named_prompts(seed, "demo names", num_prior), _anchors(seed, num_anchors),
    )  # fmt: skip


def write_dataset(concept: Concept, folder: Path) -> None:
    """Writes the targets as PNG files with captions of the same name, like a user's dataset; [V] is the concept."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = _captions(concept.targets, PLACEHOLDER, concept.worded)
    for i, (image, text) in enumerate(zip(to_images(render(concept.targets)), texts, strict=True)):
        image.save(folder / f"target_{i + 1}.png")
        (folder / f"target_{i + 1}.txt").write_text(text + "\n", encoding="utf-8")


def _style_scenes(seed: int, count: int) -> Scenes:
    """`count` badges in one style that no bound name has, all targets in different shapes and colours."""
    generator = make_generator(seed, "demo style")
    bound = {tuple(row[2:]) for row in STYLES.appearance.tolist()}
    patterned = [(c, t) for c in range(len(COLOURS)) for t in range(1, len(TEXTURES)) if (c, t) not in bound]
    center, texture = patterned[int(torch.randint(len(patterned), (), generator=generator))]
    shapes = torch.randperm(6, generator=generator)[:NUM_TARGETS]
    colours = [colour for colour in torch.randperm(len(COLOURS), generator=generator).tolist() if colour != center]
    rows = torch.tensor([[FREE, FREE, center, texture]]).repeat(count, 1)
    scenes = scenes_with(rows, generator)
    scenes.shape[:NUM_TARGETS], scenes.colour[:NUM_TARGETS] = shapes, torch.tensor(colours[:NUM_TARGETS])
    return scenes


def _named_prompts(seed: int, key: str, count: int) -> Prompts:
    """Prompts with `count` different bound subjects (again from the first where there are more)."""
    generator = make_generator(seed, key)
    pick = torch.randperm(len(SUBJECTS), generator=generator)[torch.arange(count) % len(SUBJECTS)]
    scenes = scenes_with(SUBJECTS.appearance[pick], generator)
    texts = tuple(caption(scenes, i, name=SUBJECTS.texts[name]) for i, name in enumerate(pick.tolist()))
    return Prompts(texts, scenes)


def _anchors(seed: int, count: int) -> tuple[str, ...]:
    """Ordinary prompts to keep: the words describe half of the badges, bound names the others."""
    described = sample_scenes(count - count // 2, make_generator(seed, "demo anchors"))
    named = _named_prompts(seed, "demo anchors, names", count // 2) if count > 1 else None
    return _captions(described, "", APPEARANCE) + (named.texts if named else ())


def _at(scenes: Scenes, position: Tensor, background: Tensor) -> Scenes:
    return replace(scenes, position=position, background=background)


def _captions(scenes: Scenes, name: str, attributes: tuple[str, ...]) -> tuple[str, ...]:
    brief = bool(name and attributes)
    return tuple(caption(scenes, i, name=name, attributes=attributes, brief=brief) for i in range(len(scenes)))
