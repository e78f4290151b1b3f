"""Scores of the demo, on prompts that were not trained on, in the model's own few steps.

Always report them together: a blurred image with the right colours has a good concept error, a sharp image of the
wrong object has a good sharpness.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, pstdev

import torch
from torch import Tensor

from ..demo.concept import Concept
from ..demo.world import APPEARANCE, BACKGROUNDS, IMAGE_SIZE, LAYOUT, POSITIONS, render, sample_scenes
from ..metrics.evaluation import Case, Measure
from ..metrics.pixels import resized_to
from ..metrics.protocol import ShotKind
from .judge import Judge, frechet_distance, judge_features, judged_right, laplacian_energy


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one concept with one noise seed. Lower is better for errors, distances and leakage.

    Attributes:
        concept_error: 1 - accuracy of the attributes that the concept decides, on trigger prompts.
        prompt_following: accuracy of position, background and the attributes in words, on trigger prompts.
        sharpness: Laplacian energy relative to real renders (1 for real ones).
        frechet_trigger: Fréchet distance to real renders of the same trigger prompts.
        frechet_prior: the same for prompts without the trigger (forgetting).
        prior_error: 1 - accuracy of the appearance that a prompt without the trigger describes.
        names_wrong: 1 - accuracy of the appearance that a bound name without the trigger stands for (forgetting).
        leak: share of the concept's attributes in images of prompts that name no appearance (chance is about 0.19).
    """

    concept_error: float
    prompt_following: float
    sharpness: float
    frechet_trigger: float
    frechet_prior: float
    prior_error: float
    names_wrong: float
    leak: float


TITLES = {
    "concept_error": "concept error",
    "prompt_following": "prompt following",
    "sharpness": "sharpness",
    "frechet_trigger": "Fréchet, [V]",
    "frechet_prior": "Fréchet, prior",
    "prior_error": "prior error",
    "names_wrong": "names wrong",
    "leak": "leakage",
}
"""Of the fields of `Scores`, in the order of tables."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of one model, in [0, 1].

    Attributes:
        trigger: [n, 3, 64, 64], of prompts with the trigger.
        described: [m, 3, 64, 64], of prompts that describe another appearance.
        generic: [m, 3, 64, 64], of prompts that name no appearance.
        named: [m, 3, 64, 64], of prompts with a bound name.
    """

    trigger: Tensor
    described: Tensor
    generic: Tensor
    named: Tensor


def score(samples: Samples, concept: Concept, judge: Judge) -> Scores:
    """Scores samples of the concept's prompts with the judge."""
    wanted = concept.unseen.scenes
    right = judged_right(judge, samples.trigger, wanted.labels())
    real = render(wanted)
    described = judged_right(judge, samples.described, concept.described.scenes.labels())
    count = len(samples.generic)
    owner = {name: value[:1].expand(count) for name, value in wanted.labels().items()}
    leaked = judged_right(judge, samples.generic, {name: owner[name] for name in concept.decided})
    named = judged_right(judge, samples.named, concept.named.scenes.labels())
    ordinary = [render(prompts.scenes) for prompts in (concept.described, concept.generic, concept.named)]
    return Scores(
        concept_error=1 - _accuracy(right, concept.decided),
        prompt_following=_accuracy(right, (*LAYOUT, *concept.worded)),
        sharpness=float(laplacian_energy(samples.trigger).mean() / laplacian_energy(real).mean()),
        frechet_trigger=frechet_distance(judge_features(judge, samples.trigger), judge_features(judge, real)),
        frechet_prior=frechet_distance(
            judge_features(judge, torch.cat([samples.described, samples.generic, samples.named])),
            judge_features(judge, torch.cat(ordinary)),
        ),
        prior_error=1 - _accuracy(described, APPEARANCE),
        names_wrong=1 - _accuracy(named, APPEARANCE),
        leak=_accuracy(leaked, concept.decided),
    )


def summarise(runs: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Mean over the runs, and the standard deviation if there are several: {"concept_error": {"mean", "std"}, ...}."""
    values = {name: [asdict(run)[name] for run in runs] for name in asdict(runs[0])}
    return {
        name: {"mean": mean(found)} | ({"std": pstdev(found)} if len(found) > 1 else {})
        for name, found in values.items()
    }


def gap_closed(methods: Mapping[str, Mapping[str, Mapping[str, float]]], method: str = "dopsd") -> float:
    """Share of the gap in concept error between untouched model and teacher that the method closed; 1 if it equals
    the teacher."""
    error = {name: values["concept_error"]["mean"] for name, values in methods.items()}
    return (error["base"] - error[method]) / max(error["base"] - error["teacher"], 1e-9)


def frechet_floor(judge: Judge, size: int) -> float:
    """The Fréchet distance of two sets of `size` REAL renders: the bias of a finite sample."""
    draws = [render(sample_scenes(size, torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    return frechet_distance(*(judge_features(judge, images) for images in draws))


def _accuracy(right: Mapping[str, Tensor], names: Sequence[str]) -> float:
    return mean(float(right[name].float().mean()) for name in names)


def judge_measures(judge: Judge, sources: Sequence[Tensor]) -> list[Measure]:
    """The judge in place of metrics that need weights, for the report card of a LoRA of the demo model.

    Args:
        sources: the dataset's images [3, h, w] in [0, 1]; most of them determine what the concept looks like.
    """
    seen = _classes(judge, torch.stack([_judged_size(source) for source in sources]))
    concept = {name: int(seen[name].mode().values) for name in APPEARANCE}
    trigger: frozenset[ShotKind] = frozenset({"rewrite", "test"})
    ordinary: frozenset[ShotKind] = frozenset({"ordinary"})

    def resemblance(case: Case) -> float:
        found = _classes(judge, _judged_size(case.image)[None])
        return mean(float(found[name]) == concept[name] for name in APPEARANCE)

    def distance(case: Case) -> float:
        ours, theirs = judge_features(judge, torch.stack([_judged_size(i) for i in (case.image, case.untouched)]))
        return 0.0 if case.image is case.untouched else float(1 - torch.cosine_similarity(ours, theirs, dim=0))

    return [
        Measure("judge_concept", "concept error", "concept", "lower", trigger, lambda case: 1 - resemblance(case)),
        Measure(
            "judge_following", "position, background right", "following", "higher", trigger,
            lambda case: _layout_accuracy(judge, case),
        ),
        Measure("judge_retention", "judge's features, to untouched", "retention", "unchanged", ordinary, distance),
        Measure("judge_leak", "concept in ordinary images", "retention", "lower", ordinary, resemblance),
    ]  # fmt: skip


def _layout_accuracy(judge: Judge, case: Case) -> float:
    """Share of the position and background that the prompt names; NaN if it names none."""
    wanted = {
        "position": _named(POSITIONS, r"\b{}\b", case.shot.prompt),
        "background": _named(BACKGROUNDS, r"\b{} background\b", case.shot.prompt),
    }
    found = _classes(judge, _judged_size(case.image)[None])
    right = [float(found[name]) == index for name, index in wanted.items() if index is not None]
    return mean(right) if right else float("nan")


def _named(words: Iterable[str], pattern: str, prompt: str) -> int | None:
    """The index of the word that a prompt contains."""
    return next((i for i, word in enumerate(words) if re.search(pattern.format(re.escape(word)), prompt)), None)


@torch.no_grad()
def _classes(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    """The judge's class [n] per attribute of images [n, 3, 64, 64]."""
    return {name: logits.argmax(1) for name, logits in judge(images.clamp(0, 1)).items()}


def _judged_size(image: Tensor) -> Tensor:
    return resized_to(image, torch.empty(3, IMAGE_SIZE, IMAGE_SIZE))
