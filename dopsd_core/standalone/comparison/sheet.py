"""The contact sheet of a comparison: a row per method, the same prompts and the same noise in every row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...demo.concept import Concept, Prompts, make_concept
from ...demo.settings import SAMPLE_STEPS
from ...demo.world import TRIGGER, render
from ...image_grid import Row, contact_sheet
from ..evaluate import Samples
from .experiment import Outcomes, Plan
from .methods import REFERENCES
from .trials import Regime, Trial, saved_images

_SHOWN = {"unseen": 4, "described": 2, "generic": 2}
"""Prompts of each kind: with [V], with words for another appearance, without words."""


def draw_comparison(plan: Plan, found: Mapping[str, Outcomes], output: Path) -> Image.Image:
    """The images of the first concept and seed in the first regime, with concept error and leakage of each method."""
    regime: Regime = "steps" if "steps" in found else "work"
    outcomes = found[regime]
    concept = make_concept(plan.concepts[0], style=plan.style)
    real = Samples(*(render(prompts.scenes) for prompts in (*_prompts(concept), concept.named)))
    rows = [Row("renders", "what the prompts say", _picked(concept, real), _captions(concept))]
    for method in (*REFERENCES, *plan.methods):
        trial = Trial(method, plan.concepts[0], plan.seeds[0], regime)
        scores = outcomes[method.name][0][0].scores
        remark = f"concept error {scores['concept_error']:.2f}, leakage {scores['leak']:.2f}"
        rows.append(Row(method.title, remark, _picked(concept, saved_images(trial, output))))
    each = f"{plan.steps} steps" if regime == "steps" else f"{plan.work} forwards"
    return contact_sheet(f"{concept.words} = {TRIGGER}; {each} each, drawn in {SAMPLE_STEPS} steps", rows)


def _prompts(concept: Concept) -> tuple[Prompts, Prompts, Prompts]:
    return concept.unseen, concept.described, concept.generic


def _indices(prompts: Prompts, count: int) -> list[int]:
    return list(range(0, len(prompts.texts), max(1, len(prompts.texts) // count)))[:count]


def _picked(concept: Concept, samples: Samples) -> Tensor:
    """The shown images, [8, 3, h, w]."""
    kinds = zip(_prompts(concept), _SHOWN.values(), (samples.trigger, samples.described, samples.generic), strict=True)
    return torch.cat([images[_indices(prompts, count)] for prompts, count, images in kinds])


def _captions(concept: Concept) -> list[str]:
    kinds = zip(_prompts(concept), _SHOWN.values(), strict=True)
    texts = [prompts.texts[i] for prompts, count in kinds for i in _indices(prompts, count)]
    shorter = [text.replace(", on a ", ", ").removesuffix(" background") for text in texts]
    return [text.removeprefix("a ").replace("badge, ", "") for text in shorter]
