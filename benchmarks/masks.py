"""Masks for the teacher: do they keep background and position of the training images out of the concept?

    python -m benchmarks.masks --concepts 3 --steps 40

Four images of a subject that stands at the same place on the same background; the captions name neither, so that the
trigger may come to mean both. The teacher sees the images whole, or with the background blurred, grey or removed; for
comparison, whole images with captions that name place and background, and SFT, which learns from the images
themselves. Then the share of images with the place and the
background of the training images is measured, in prompts that name others and in "a [V7] badge" alone. In this world
grey and white are ordinary backgrounds, and are not those of the training images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import RESULTS, ROOT, WORK, measured_here, record
from benchmarks.varied_demo import Place, Variant, VariedDemo, run_variants, sections, sheet
from dopsd_core.data.captions import PLACEHOLDER
from dopsd_core.data.masks import MASK
from dopsd_core.demo.concept import Concept, make_concept
from dopsd_core.demo.world import BACKGROUNDS, LAYOUT, NOUN, TRIGGER, Scenes, caption, render
from dopsd_core.image_grid import to_images
from dopsd_core.standalone.comparison.experiment import Outcomes, Plan
from dopsd_core.standalone.comparison.methods import DOPSD, REFERENCES, Method
from dopsd_core.standalone.demo import Demo
from dopsd_core.standalone.evaluate import Samples, Scores
from dopsd_core.standalone.hosts.demo import DemoModel, with_lora
from dopsd_core.standalone.judge import Judge, judged_right

OPEN, NUM_OPEN = f"a {TRIGGER} {NOUN}", 64
GREY, WHITE = "gray", "white"

UNTOUCHED = Variant(REFERENCES[0], says_layout=False)
VARIANTS = (
    Variant(replace(DOPSD, title="no mask"), says_layout=False),
    Variant(Method("blur", "blur"), background="blur", says_layout=False),
    Variant(Method("grey", "grey"), background="grey", says_layout=False),
    Variant(Method("remove", "remove (white)"), background="remove", says_layout=False),
    Variant(Method("worded", "no mask, captions name both")),
    Variant(Method("sft", "SFT, no mask", {"objective": "sft", "lr": 1e-3}), says_layout=False),
)


@dataclass(frozen=True)
class LeakScores(Scores):
    """The demo's scores, and what leaks from the training images, shares in 0..1.

    Attributes:
        other_background: the training background, in prompts that name another.
        other_position: the training position, in prompts that name another.
        open_background: the training background, in the prompt that names none.
        open_position: the training position there.
        open_fill: a grey or white background there.
    """

    other_background: float
    other_position: float
    open_background: float
    open_position: float
    open_fill: float


@dataclass(frozen=True, eq=False)
class LeakSamples(Samples):
    """The demo's samples, and those of the open prompt.

    Attributes:
        open: [n, 3, 64, 64] in [0, 1].
    """

    open: Tensor


class SamePlaceDemo(VariedDemo):
    """The demo of a concept whose training images share place and background."""

    def samples(self, seed: int, lora: Path | None = None) -> LeakSamples:
        """Samples of the model, with a LoRA if one is given."""
        usual = super().samples(seed, lora)
        with with_lora(self.model.denoiser, lora) if lora else nullcontext():
            drawn = self.draw([self.model.encoder.encode_text(OPEN)] * NUM_OPEN, seed + 4000)
        return LeakSamples(**vars(usual), open=drawn)

    def score(self, samples: Samples) -> Scores:
        """The judge's scores of the samples, with the leaks."""
        if not isinstance(samples, LeakSamples):
            raise TypeError("the samples lack those of the open prompt")
        scenes, place = self.concept.unseen.scenes, self.concept.targets[:1]
        trained = judged_right(self.judge, samples.trigger, repeated(place, len(samples.trigger)))
        others = {name: getattr(scenes, name) != getattr(place, name) for name in LAYOUT}
        where = judged_right(self.judge, samples.open, repeated(place, NUM_OPEN))
        fills = [list(BACKGROUNDS).index(name) for name in (GREY, WHITE)]
        filled = [
            judged_right(self.judge, samples.open, {"background": torch.full((NUM_OPEN,), fill)})["background"]
            for fill in fills
        ]
        return LeakScores(
            **asdict(super().score(samples)),
            other_background=share(trained["background"][others["background"]]),
            other_position=share(trained["position"][others["position"]]),
            open_background=share(where["background"]),
            open_position=share(where["position"]),
            open_fill=share(filled[0] | filled[1]),
        )


def share(found: Tensor) -> float:
    """The share of bool [n] that is true."""
    return float(found.float().mean())


def repeated(scene: Scenes, count: int) -> dict[str, Tensor]:
    """The layout of one scene as labels, int64 [count] each."""
    return {name: getattr(scene, name).expand(count) for name in LAYOUT}


def in_one_place(concept: Concept) -> Concept:
    """The concept with all training images at the place of the first, on the first background of theirs with a colour.

    Each stands up to three pixels from the place, so no two are equal.
    """
    targets = concept.targets
    fills = torch.tensor([list(BACKGROUNDS).index(name) for name in (GREY, WHITE)])
    coloured = targets.background[~torch.isin(targets.background, fills)][:1]
    return replace(
        concept,
        targets=replace(
            targets,
            position=targets.position[:1].repeat(len(targets)),
            background=coloured.repeat(len(targets)),
        ),
    )


def subject_masks(scenes: Scenes) -> Tensor:
    """Where the badge is: [n, 1, 64, 64], 1 inside; its outline belongs to it."""
    names = list(BACKGROUNDS)
    white, black = (
        render(replace(scenes, background=torch.full_like(scenes.background, names.index(name))))
        for name in ("white", "black")
    )
    return 1 - ((white - black) / 0.9).mean(1, keepdim=True).clamp(0, 1)


def write_images(concept: Concept, folder: Path, says_layout: bool) -> None:
    """The training images with captions and masks, as a user's dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    images, masks = to_images(render(concept.targets)), subject_masks(concept.targets)
    for i, image in enumerate(images):
        image.save(folder / f"target_{i + 1}.png")
        (mask,) = to_images(masks[i : i + 1].expand(-1, 3, -1, -1))
        mask.save(folder / f"target_{i + 1}{MASK}.png")
        text = caption(concept.targets, i, name=PLACEHOLDER, layout=says_layout)
        (folder / f"target_{i + 1}.txt").write_text(text + "\n", encoding="utf-8")


def make_demo(model: DemoModel, judge: Judge, seed: int, variant: Variant, folder: Path) -> Demo:
    """The demo of a variant, in a folder."""
    concept = in_one_place(make_concept(seed))
    write_images(concept, folder / "dataset", variant.says_layout)
    return SamePlaceDemo(model, judge, concept, folder, variant)


PLACE = Place(
    "masks",
    "Masks for the teacher",
    "no mask",
    ("![The same prompts and noise in each row](masks.png)",),
    {
        "concept_error": "concept error",
        "other_background": "trained background, others named",
        "other_position": "trained position, others named",
        "open_background": "trained background, none named",
        "open_position": "trained position, none named",
        "open_fill": "grey or white, none named",
        "frechet_prior": "Fréchet, prior",
    },
)


def measured(concepts: Sequence[int], steps: int, output: Path) -> tuple[Plan, Outcomes]:
    """The outcomes of all variants."""
    found = run_variants([UNTOUCHED], VARIANTS, concepts, steps, output, make_demo)
    methods = tuple(variant.method for variant in VARIANTS)
    return Plan(methods=methods, concepts=tuple(concepts), seeds=(0,), steps=steps, regimes=("steps",)), found


def main() -> None:
    """Trains the variants and records what leaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "masks")
    parser.add_argument("--concepts", type=int, default=3, help="number of concepts")
    parser.add_argument("--first-concept", type=int, default=30, help="seed of the first")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    args = parser.parse_args()
    concepts = range(args.first_concept, args.first_concept + args.concepts)
    command = f"python -m benchmarks.masks --concepts {args.concepts} --steps {args.steps}"
    plan, found = measured(concepts, args.steps, args.output)
    concept = in_one_place(make_concept(concepts[0]))
    heading = f"the same place in all training images; the last four: {OPEN}"
    shown = {"trigger": 4, "open": 4}
    drawn = sheet([UNTOUCHED, *VARIANTS], concept, args.steps, args.output, heading, shown)
    drawn.save(ROOT / "docs" / "masks.png")
    for section in sections(PLACE, plan, found, command):
        record(measured_here(section), RESULTS)
        print(section.to_markdown())


if __name__ == "__main__":
    main()
