"""Trainings of the demo that differ from its own in settings, in what the teacher sees, or in the anchors.

A variant is a method of `python -m dopsd_core compare` with data of its own. Variants run one after another in this
process, with one thread; those that are in the output folder already are not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.report import Section, Table
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.teachers import VLM, Background
from dopsd_core.data.dataset import Pair
from dopsd_core.demo.concept import Concept, make_concept, write_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.world import TRIGGER
from dopsd_core.image_grid import Row, contact_sheet
from dopsd_core.standalone.comparison.experiment import Outcomes, Plan, models_fingerprint
from dopsd_core.standalone.comparison.methods import Method
from dopsd_core.standalone.comparison.report import grids
from dopsd_core.standalone.comparison.trials import Trial, run_trial, saved_outcome
from dopsd_core.standalone.demo import Demo
from dopsd_core.standalone.hosts.demo import DemoModel, load_demo_model
from dopsd_core.standalone.judge import Judge, load_judge
from dopsd_core.training.shown_images import TeacherImage
from dopsd_core.training.training_set import TrainingSet, build_training_set

Anchors = Literal["all", "captions", "described", "names", "alone"]
"""Prior anchors: the captions without the trigger, and beside them nothing, descriptions, bound names, or both; of
edits with their source images, or "alone": the descriptions and names without any."""


@dataclass(frozen=True)
class Variant:
    """A training.

    Attributes:
        method: its settings, and its name, which no other variant has.
        teacher_image: whether the teacher sees the image that is trained or others.
        background: what the teacher sees around the subject.
        anchors: the prior anchors.
        says_layout: whether the captions name position and background.
    """

    method: Method
    teacher_image: TeacherImage = "own"
    background: Background = "keep"
    anchors: Anchors = "all"
    says_layout: bool = True

    @property
    def data(self) -> tuple[str, ...]:
        """What it differs in besides the method's settings, as words for a folder."""
        layout = "layout" if self.says_layout else "no-layout"
        return self.teacher_image, self.background, self.anchors, layout


class VariedDemo(Demo):
    """The demo of a concept with the data of a variant."""

    def __init__(self, model: DemoModel, judge: Judge, concept: Concept, output: Path, variant: Variant) -> None:
        self.variant = variant
        super().__init__(model, judge, concept, output)

    def training_set(self, pairs: Sequence[Pair], cache: ConditionCache) -> TrainingSet:
        """The images with the variant's teacher and anchors."""
        return build_training_set(
            pairs, self.model.encoder, cache, teacher=VLM.with_background(self.variant.background),
            teacher_image=self.variant.teacher_image, trigger=TRIGGER, anchors=True,
            anchor_prompts=anchor_prompts(self.concept, self.variant.anchors),
            heldout_caption=self.concept.unseen.texts[0],
        )  # fmt: skip


MakeDemo = Callable[[DemoModel, Judge, int, Variant, Path], Demo]
"""(model, judge, seed of the concept, variant, folder) -> the demo to train in that folder."""


def anchor_prompts(concept: Concept, kind: Anchors) -> tuple[str, ...]:
    """The prompts of this kind among the concept's anchors; its own are half described, half bound names."""
    named = set(concept.anchors) & _with_names(concept.anchors)
    kinds = {
        "all": concept.anchors,
        "alone": concept.anchors,
        "captions": (),
        "described": tuple(text for text in concept.anchors if text not in named),
        "names": tuple(text for text in concept.anchors if text in named),
    }
    return kinds[kind]


def _with_names(texts: Sequence[str]) -> set[str]:
    return {text for text in texts if "[" in text}


def small_concept(seed: int, style: bool) -> Concept:
    """The concept of a seed with half of the usual prompts."""
    return make_concept(seed, style=style, num_unseen=30, num_prior=32)


def plain_demo(style: bool) -> MakeDemo:
    """Makes the demo of a subject or a style with its usual images."""

    def make(model: DemoModel, judge: Judge, seed: int, variant: Variant, folder: Path) -> Demo:
        concept = small_concept(seed, style)
        write_dataset(concept, folder / "dataset")
        return VariedDemo(model, judge, concept, folder, variant)

    return make


def run_variants(
    references: Sequence[Variant], variants: Sequence[Variant], concepts: Sequence[int], steps: int, output: Path,
    make: MakeDemo,
) -> Outcomes:  # fmt: skip
    """Outcomes by the name of the method, a row per concept with one seed each.

    Args:
        references: variants that are only scored (their methods are `REFERENCES`).
        steps: optimizer steps.
    """
    torch.set_num_threads(1)
    model, judge, fingerprint = load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE), models_fingerprint(False)
    found: Outcomes = {variant.method.name: [] for variant in (*references, *variants)}
    for concept in concepts:
        demos: dict[tuple[str, ...], Demo] = {}
        for variant in (*references, *variants):
            trial, keeps, folder = _trial(variant, concept, steps), concept == concepts[0], _folder(output, variant)
            outcome = saved_outcome(trial, folder, fingerprint, keeps)
            if outcome is None:
                if variant.data not in demos:
                    demos[variant.data] = make(model, judge, concept, variant, folder / f"concept-{concept}")
                outcome = run_trial(trial, demos[variant.data], folder, fingerprint, keeps)
                print(variant.method.title, concept, {k: round(v, 3) for k, v in outcome.scores.items()}, flush=True)
            found[variant.method.name].append([outcome])
    return found


def sheet(
    variants: Sequence[Variant], concept: Concept, steps: int, output: Path, heading: str, shown: Mapping[str, int],
    given: Row | None = None,
) -> Image.Image:  # fmt: skip
    """The same prompts and noise in every row, for the first concept.

    Args:
        shown: how many images of each kind, by its name in the samples ("trigger", "described").
        given: a row above: what the model is given beside the prompts.
    """
    prompts = {"trigger": concept.unseen, "described": concept.described, "named": concept.named}
    rows = [] if given is None else [given]
    for variant in variants:
        trial = _trial(variant, concept.seed, steps)
        kept = load_file(_folder(output, variant) / "images" / f"{trial.name}.safetensors")
        images = torch.cat([spread(kept[kind], count).float() / 255 for kind, count in shown.items()])
        rows.append(Row(variant.method.title, "", images))
    said = [
        text.removeprefix("a ").removesuffix(" background").replace("badge, ", "")
        for kind, count in shown.items() for text in _texts(prompts[kind].texts if kind in prompts else (), count)
    ]  # fmt: skip
    rows[0] = replace(rows[0], captions=said)
    return contact_sheet(heading, rows)


def spread(values: Tensor, count: int) -> Tensor:
    """`count` of the values [n, ...], evenly spread."""
    return values[:: max(1, len(values) // count)][:count]


def _texts(texts: Sequence[str], count: int) -> list[str]:
    return list(texts[:: max(1, len(texts) // count)][:count]) if texts else [""] * count


def _trial(variant: Variant, concept: int, steps: int) -> Trial:
    return Trial(variant.method, concept, 0, "steps", steps)


def _folder(output: Path, variant: Variant) -> Path:
    return output / "-".join(variant.data)


@dataclass(frozen=True)
class Place:
    """Where the figures of variants stand in docs/results.md.

    Attributes:
        key: of the section.
        title: its heading.
        reference: the variant that the differences are from, in words.
        about: sentences below the means.
        titles: figure -> column; all figures under the usual columns without any.
    """

    key: str
    title: str
    reference: str
    about: tuple[str, ...]
    titles: Mapping[str, str] = field(default_factory=dict)


def sections(place: Place, plan: Plan, found: Outcomes, command: str) -> list[Section]:
    """Means, and differences from the first variant; without what the runs cost."""
    if place.titles:
        found = {
            name: [[replace(o, scores={t: o.scores[key] for key, t in place.titles.items()}) for o in r] for r in rows]
            for name, rows in found.items()
        }
    made = []
    both = grids(place.key, plan, {"steps": found}, has_costs=False)
    for grid, part in zip(both, ("", "-differences"), strict=True):
        title = f"{place.title}: differences from {place.reference}" if part else place.title
        notes = grid.notes if part else (*grid.notes, *place.about)
        made.append(Section(place.key + part, title, command, None, Table(grid.columns, grid.rows), notes))
    return made
