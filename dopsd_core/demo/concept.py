"""One unseen concept of the demo's world: its training images as ordinary files, and the prompts that test it."""

from __future__ import annotations

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
    """n prompts and the n scenes that a perfect answer to them shows (any appearance where the prompt names none)."""

    texts: tuple[str, ...]
    scenes: Scenes


@dataclass(frozen=True)
class Concept:
    """A held-out appearance under the trigger word.

    targets: the training scenes. unseen: trigger prompts on backgrounds that no target has. described, generic: prompts
    without the trigger, with all words of some other, ordinary appearance and with none. anchors: other ordinary
    prompts.
    """

    seed: int
    targets: Scenes
    unseen: Prompts
    described: Prompts
    generic: Prompts
    anchors: tuple[str, ...]

    @property
    def words(self) -> str:
        """What the concept looks like, in words that no training caption has."""
        return caption(self.targets, 0, attributes=APPEARANCE, layout=False)


def make_concept(seed: int, *, num_unseen: int = 60, num_prior: int = 64, num_anchors: int = 8) -> Concept:
    """The concept of that seed; equal on every machine."""
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
    """The targets as PNG files with captions of the same name, as a user would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(to_images(render(concept.targets))):
        image.save(folder / f"target_{i + 1}.png")
        (folder / f"target_{i + 1}.txt").write_text(caption(concept.targets, i, name=TRIGGER) + "\n", encoding="utf-8")


def _at(scenes: Scenes, position: Tensor, background: Tensor) -> Scenes:
    return replace(scenes, position=position, background=background)


def _prompts(scenes: Scenes, name: str, attributes: tuple[str, ...]) -> Prompts:
    texts = tuple(caption(scenes, i, name=name, attributes=attributes) for i in range(len(scenes)))
    return Prompts(texts, scenes)
