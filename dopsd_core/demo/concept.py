"""An unseen concept of the demo world: its training images as ordinary files, and the prompts to evaluate it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..image_grid import to_images
from ..training.rng import make_generator
from .world import APPEARANCE, BACKGROUNDS, POSITIONS, TRIGGER, Scenes, caption, render, sample_scenes

NUM_TARGETS = 4


@dataclass(frozen=True)
class Prompts:
    """n prompts with n matching scenes (with any appearance if the prompt names none).

    Attributes:
        texts: the prompts.
        scenes: the scenes that they describe.
    """

    texts: tuple[str, ...]
    scenes: Scenes


@dataclass(frozen=True)
class Concept:
    """A held-out appearance that is named by the trigger word.

    Attributes:
        seed: selects the concept.
        targets: the training scenes.
        unseen: prompts with the trigger, on backgrounds that no target has.
        described: prompts without the trigger that describe some other, ordinary appearance in full.
        generic: prompts without the trigger and without any word for the appearance.
        anchors: other ordinary prompts.
    """

    seed: int
    targets: Scenes
    unseen: Prompts
    described: Prompts
    generic: Prompts
    anchors: tuple[str, ...]

    @property
    def words(self) -> str:
        """The concept's appearance for people to read, in words that do not occur in the training captions.

        Unlike in prompts, on whose words the models are trained, "a" is "an" before a vowel.
        """
        return re.sub(r"\ba (?=[aeiou])", "an ", caption(self.targets, 0, attributes=APPEARANCE, layout=False))


def make_concept(seed: int, *, num_unseen: int = 60, num_prior: int = 64, num_anchors: int = 8) -> Concept:
    """The concept of a seed, equal on every machine."""
    generator = make_generator(seed, "demo concept")
    appearance = sample_scenes(1, generator, held_out=True)
    layout = sample_scenes(NUM_TARGETS, generator)
    positions = torch.randperm(len(POSITIONS), generator=generator)
    backgrounds = torch.randperm(len(BACKGROUNDS), generator=generator)
    layout = _at(layout, positions[:NUM_TARGETS], backgrounds[:NUM_TARGETS])
    targets = appearance.repeat(NUM_TARGETS).with_layout_of(layout)
    new = backgrounds[NUM_TARGETS:]
    test = sample_scenes(num_unseen, generator)
    step = torch.arange(num_unseen)
    test = _at(test, positions[step % len(positions)], new[(step // len(positions)) % len(new)])
    unseen = appearance.repeat(num_unseen).with_layout_of(test)
    described, generic = sample_scenes(num_prior, generator), sample_scenes(num_prior, generator)
    anchors = sample_scenes(num_anchors, make_generator(seed, "demo anchors"))
    return Concept(
        seed, targets, _prompts(unseen, TRIGGER, ()), _prompts(described, "", APPEARANCE), _prompts(generic, "", ()),
        tuple(caption(anchors, i, attributes=APPEARANCE) for i in range(num_anchors)),
    )  # fmt: skip


def write_dataset(concept: Concept, folder: Path) -> None:
    """Writes the targets as PNG files with captions of the same name, like a user's dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(to_images(render(concept.targets))):
        image.save(folder / f"target_{i + 1}.png")
        (folder / f"target_{i + 1}.txt").write_text(caption(concept.targets, i, name=TRIGGER) + "\n", encoding="utf-8")


def _at(scenes: Scenes, position: Tensor, background: Tensor) -> Scenes:
    return replace(scenes, position=position, background=background)


def _prompts(scenes: Scenes, name: str, attributes: tuple[str, ...]) -> Prompts:
    texts = tuple(caption(scenes, i, name=name, attributes=attributes) for i in range(len(scenes)))
    return Prompts(texts, scenes)
