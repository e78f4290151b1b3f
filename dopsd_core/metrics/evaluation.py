"""Evaluates a LoRA: the same images with and without it, from the same noise, scored by every measure at hand.

Four groups, which only say something together: a LoRA that copies its images has the concept and no following, one
that does nothing keeps everything.

    concept     is it the concept?             images with the trigger, against the source images
    following   is it what the prompt says?    images with the trigger, against their prompts
    few steps   are they as good as before?    sharpness and quality of images in the model's own few steps
    retention   is the rest unchanged?         ordinary prompts, with and without the LoRA from the same noise
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from ..training.rng import derive_seed
from .intervals import Interval, bootstrap, paired_difference
from .protocol import Shot, ShotKind

Group = Literal["concept", "following", "few steps", "retention"]
GROUPS: tuple[Group, ...] = ("concept", "following", "few steps", "retention")

Better = Literal["lower", "higher", "near 1", "unchanged"]
"""What a good value is. unchanged: the value is a distance to the untouched model's image, 0 for that model itself."""

Word = Literal["better", "worse", "no clear change", "kept", "partly kept", "changed", "sharp", "blurry", "over-sharp"]

KEPT, CHANGED = 1 / 3, 1.0
"""Retention as a share of the noise floor: up to KEPT the images are kept, from CHANGED on they are as far from the
untouched model's as images from other noise."""

SHARP = 0.1
"""Allowed deviation of the sharpness from 1."""

Draw = Callable[[float, Sequence[Shot]], Sequence[Tensor]]
"""(strength of the LoRA, 0 for the untouched model; images to draw) -> images [3, H, W] in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Case:
    """An image to score.

    Attributes:
        shot: how it was drawn.
        image: [3, H, W] in [0, 1].
        untouched: the untouched model's image of the same prompt and noise, [3, H, W] in [0, 1].
        source: the dataset's image [3, h, w] in [0, 1] that the prompt belongs to; None for an ordinary prompt.
    """

    shot: Shot
    image: Tensor
    untouched: Tensor
    source: Tensor | None


@dataclass(frozen=True)
class Measure:
    """A score of an image.

    Attributes:
        name: key in the JSON report.
        title: as people read it.
        group: what it says something about.
        better: what a good value is.
        kinds: the prompts whose images it scores.
        score: the value of a case; NaN if there is none.
    """

    name: str
    title: str
    group: Group
    better: Better
    kinds: frozenset[ShotKind]
    score: Callable[[Case], float]


@dataclass(frozen=True)
class Measured:
    """The values of a measure, one per image.

    Attributes:
        name: key in the JSON report.
        title: as people read it.
        group: what it says something about.
        better: what a good value is.
        prompts: the prompt of each image; several images of a prompt are resampled together.
        untouched: values of the untouched model.
        other_noise: values of the untouched model with other noise, for the noise floor; () if not measured.
        strengths: values with the LoRA, by strength.
    """

    name: str
    title: str
    group: Group
    better: Better
    prompts: tuple[str, ...]
    untouched: tuple[float, ...]
    other_noise: tuple[float, ...]
    strengths: Mapping[float, tuple[float, ...]]

    @property
    def is_readable(self) -> bool:
        """Whether each strength can be compared with the untouched model, on at least one prompt."""
        return all(
            any(math.isfinite(a - b) for a, b in zip(values, self.untouched, strict=True))
            for values in self.strengths.values()
        )

    @property
    def floor(self) -> float | None:
        """The noise floor: how much the mean changes with the noise alone; for retention, the mean distance of two
        noises. None if not measured."""
        if not any(math.isfinite(value) for value in self.other_noise):
            return None
        other = bootstrap(self.other_noise).mean
        return other if self.better == "unchanged" else abs(other - bootstrap(self.untouched).mean)

    def verdict(self, strength: float) -> Verdict:
        """What the values at a strength say."""
        mean = bootstrap(self.strengths[strength], self.prompts)
        change = paired_difference(self.strengths[strength], self.untouched, self.prompts)
        if self.better == "unchanged":
            share = mean.mean / self.floor if self.floor else None
            return Verdict(mean, change, share, "kept" if mean.mean == 0 else _retention_word(share))
        if self.better == "near 1":
            return Verdict(mean, change, None, _sharpness_word(mean))
        clear = change.excludes_zero and abs(change.mean) > (self.floor or 0)
        improved = (change.mean > 0) == (self.better == "higher")
        return Verdict(mean, change, None, ("better" if improved else "worse") if clear else "no clear change")


@dataclass(frozen=True)
class Verdict:
    """What a measure says about a LoRA at one strength.

    Attributes:
        mean: the mean value with its interval.
        change: the mean difference to the untouched model over the same prompts and noise, with its interval.
        share_of_floor: retention only: the mean over the noise floor.
        word: the conclusion. A change counts only if its interval leaves zero and it is larger than the noise floor.
    """

    mean: Interval
    change: Interval
    share_of_floor: float | None
    word: Word


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result.

    Attributes:
        title: the name of the LoRA.
        strengths: in the order they were given.
        shots: the images that were drawn of every variant.
        measured: the values of every measure.
        images: [3, H, W] in [0, 1] per shot, by strength; 0 is the untouched model.
        other_noise: the untouched model's images from other noise, per shot.
        sources: the dataset's images [3, h, w] in [0, 1].
        notes: for the reader, one line each.
    """

    title: str
    strengths: tuple[float, ...]
    shots: tuple[Shot, ...]
    measured: tuple[Measured, ...]
    images: Mapping[float, Sequence[Tensor]]
    other_noise: Sequence[Tensor]
    sources: Sequence[Tensor]
    notes: tuple[str, ...] = field(default=())


def evaluate(
    title: str,
    shots: Sequence[Shot],
    sources: Sequence[Tensor],
    strengths: Sequence[float],
    draw: Draw,
    measures: Sequence[Measure],
    on_score: Callable[[], object] = lambda: None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Draws every shot without the LoRA, without it from other noise, and with it at each strength; scores them all.

    Args:
        shots: what to draw; `Shot.row` is an index into `sources`.
        sources: the dataset's images [3, h, w] in [0, 1].
        strengths: of the LoRA.
        draw: draws images; called once per variant.
        measures: those for whose kinds there is no shot are left out.
        on_score: called before each image is scored; may raise to cancel.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not shots or not strengths:
        raise ValueError("there is nothing to evaluate: give prompts and strengths")
    untouched = list(draw(0.0, shots))
    other = list(draw(0.0, with_other_noise(shots)))
    images = {0.0: untouched, **{strength: list(draw(strength, shots)) for strength in strengths}}
    measured, silent = [], []
    for measure in measures:
        chosen = [i for i, shot in enumerate(shots) if shot.kind in measure.kinds]
        if not chosen:
            continue
        scorer = _Scorer(measure, [shots[i] for i in chosen], [untouched[i] for i in chosen], sources, on_score)
        found = Measured(
            name=measure.name, title=measure.title, group=measure.group, better=measure.better,
            prompts=tuple(shots[i].prompt for i in chosen), untouched=scorer.values([untouched[i] for i in chosen]),
            other_noise=scorer.values([other[i] for i in chosen]),
            strengths={s: scorer.values([images[s][i] for i in chosen]) for s in strengths},
        )  # fmt: skip
        if found.is_readable:
            measured.append(found)
        else:
            silent.append(f"{measure.title}: not one image could be scored, so it is left out")
    return Evaluation(
        title, tuple(strengths), tuple(shots), tuple(measured), images, other, tuple(sources), (*notes, *silent)
    )


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Scores the images of one measure's shots, for every variant alike."""

    measure: Measure
    shots: Sequence[Shot]
    untouched: Sequence[Tensor]
    sources: Sequence[Tensor]
    on_score: Callable[[], object]

    def values(self, images: Sequence[Tensor]) -> tuple[float, ...]:
        found = []
        for shot, image, untouched in zip(self.shots, images, self.untouched, strict=True):
            self.on_score()
            source = None if shot.row is None else self.sources[shot.row]
            found.append(self.measure.score(Case(shot, image, untouched, source)))
        return tuple(found)


def count_scores(shots: Sequence[Shot], num_strengths: int, measures: Sequence[Measure]) -> int:
    """How often `evaluate` calls `on_score`."""
    return sum(shot.kind in measure.kinds for measure in measures for shot in shots) * (num_strengths + 2)


def with_other_noise(shots: Sequence[Shot]) -> list[Shot]:
    """The same shots from other noise, for the noise floor."""
    return [replace(shot, seed=derive_seed(shot.seed, "other noise")) for shot in shots]


def _retention_word(share: float | None) -> Word:
    if share is None:
        return "no clear change"
    return "kept" if share <= KEPT else "partly kept" if share < CHANGED else "changed"


def _sharpness_word(mean: Interval) -> Word:
    if abs(mean.mean - 1) <= SHARP:
        return "sharp"
    if mean.low <= 1 <= mean.high:
        return "no clear change"
    return "blurry" if mean.mean < 1 else "over-sharp"
