"""Domains of the demo world for benchmarks/full_weights.py: a style over everything, its prompts and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.names import FREE, STYLES, SUBJECTS, scenes_with
from dopsd_core.demo.world import APPEARANCE, COLOURS, LAYOUT, TEXTURES, Scenes, caption, render, sample_scenes
from dopsd_core.image_grid import to_images
from dopsd_core.standalone.judge import frechet_distance, judge_features, judged_right, laplacian_energy, load_judge
from dopsd_core.training.rng import make_generator

STYLE, WORDED = ("center", "texture"), ("shape", "colour")
"""What a domain decides, and what its captions say besides the layout."""

_ANCHORS, _AT_ONCE = 32, 32


@dataclass(frozen=True)
class Scores:
    """One model on one domain, in the model's own few steps.

    Attributes:
        frechet_domain: Fréchet distance to renders of the same prompts in the domain; lower is better.
        style: share of center and texture that are the domain's, on its prompts.
        following: accuracy of shape, colour, position and background, on its prompts.
        sharpness: Laplacian energy relative to these renders.
        prior_error: 1 - accuracy of a prompt that describes another appearance in full; lower is better.
        frechet_prior: Fréchet distance to renders of these prompts and of those with bound names; lower is better.
        names_wrong: 1 - accuracy of the appearance that a bound name stands for; lower is better.
    """

    frechet_domain: float
    style: float
    following: float
    sharpness: float
    prior_error: float
    frechet_prior: float
    names_wrong: float


@dataclass(frozen=True, eq=False)
class Domain:
    """A style over everything, and prompts that it must not change.

    Attributes:
        train: the training scenes.
        test: other scenes of the domain.
        described: ordinary scenes, whose prompts say all of their appearance.
        named: scenes of bound names.
        names: the names of these.
    """

    train: Scenes
    test: Scenes
    described: Scenes
    named: Scenes
    names: tuple[str, ...]

    def texts(self, kind: str) -> tuple[str, ...]:
        """The prompts of "train", "test", "described" or "named" scenes."""
        scenes: Scenes = getattr(self, kind)
        if kind == "named":
            return tuple(caption(scenes, i, name=name) for i, name in enumerate(self.names))
        attributes = APPEARANCE if kind == "described" else WORDED
        return tuple(caption(scenes, i, attributes=attributes) for i in range(len(scenes)))


def make_domain(seed: int, images: int, prompts: int) -> Domain:
    """The domain of a seed: a center and a texture that no bound style has.

    Args:
        seed: selects the domain.
        images: number of training scenes.
        prompts: number of scenes of each kind that are scored.
    """
    generator = make_generator(seed, "demo domain")
    bound = {tuple(row[2:]) for row in STYLES.appearance.tolist()}
    free = [(c, t) for c in range(len(COLOURS)) for t in range(1, len(TEXTURES)) if (c, t) not in bound]
    center, texture = free[int(torch.randint(len(free), (), generator=generator))]
    style = torch.tensor([[FREE, FREE, center, texture]])
    train_scenes, test = (scenes_with(style.repeat(n, 1), generator) for n in (images, prompts))
    ordinary = sample_scenes(4 * prompts + 64, generator)
    others = ((ordinary.center != center) & (ordinary.texture != texture)).nonzero()[:prompts, 0]
    pick = torch.randperm(len(SUBJECTS), generator=generator)[torch.arange(prompts) % len(SUBJECTS)]
    named = scenes_with(SUBJECTS.appearance[pick], generator)
    return Domain(train_scenes, test, ordinary[others], named, tuple(SUBJECTS.texts[i] for i in pick.tolist()))


def write_domain(domain: Domain, folder: Path) -> None:
    """Writes the training images with captions of the same name, like a user's dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = domain.texts("train")
    for start in range(0, len(texts), _AT_ONCE):
        images = to_images(render(domain.train[start : start + _AT_ONCE]))
        for i, image in enumerate(images, start):
            image.save(folder / f"{i:04d}.png")
            (folder / f"{i:04d}.txt").write_text(texts[i] + "\n", encoding="utf-8")


def anchor_prompts(domain_seed: int) -> tuple[str, ...]:
    """Ordinary prompts for prior anchors and PSO's losers, none of which is scored: half described, half with names."""
    generator = make_generator(domain_seed, "demo domain, anchors")
    scenes = sample_scenes(_ANCHORS, generator)
    names = torch.randperm(len(SUBJECTS), generator=generator)[: _ANCHORS // 2].tolist()
    named = scenes_with(SUBJECTS.appearance[names], generator)
    described = tuple(caption(scenes, i, attributes=APPEARANCE) for i in range(_ANCHORS // 2))
    return described + tuple(caption(named, i, name=SUBJECTS.texts[n]) for i, n in enumerate(names))


def score(domain: Domain, images: Mapping[str, Tensor]) -> Scores:
    """The judge's scores of images [n, 3, 64, 64] of "test", "described" and "named" prompts."""
    judge = load_judge(WEIGHTS / JUDGE_FILE)
    right = {kind: judged_right(judge, images[kind], getattr(domain, kind).labels()) for kind in images}
    real = {kind: render(getattr(domain, kind)) for kind in images}

    def accuracy(kind: str, names: Sequence[str]) -> float:
        return mean(float(right[kind][name].float().mean()) for name in names)

    def distance(*kinds: str) -> float:
        both = (torch.cat([of[kind] for kind in kinds]) for of in (images, real))
        return frechet_distance(*(judge_features(judge, part) for part in both))

    return Scores(
        frechet_domain=distance("test"),
        style=accuracy("test", STYLE),
        following=accuracy("test", (*WORDED, *LAYOUT)),
        sharpness=float(laplacian_energy(images["test"]).mean() / laplacian_energy(real["test"]).mean()),
        prior_error=1 - accuracy("described", APPEARANCE),
        frechet_prior=distance("described", "named"),
        names_wrong=1 - accuracy("named", APPEARANCE),
    )
