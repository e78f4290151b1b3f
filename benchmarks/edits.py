"""What the preset edit may set, measured on the demo model, made to edit.

    python -m benchmarks.edits --concepts 3 --steps 120 --variants 7

The demo model has no editing branch: its text encoder reads an image through the vision tower, and the transformer
draws the badge that was read at the place that the words name. Here that makes it an editor, as in models whose text
encoder reads the references too: it reads the last of its reference images. So the student reads the prompt and the
source, the teacher the prompt and the target (the teacher edit_target), from a folder of source and target.

The edit to learn, "a [V7] badge, ...": texture and center become those of [V7], whatever they were; shape and colour
stay those of the source. It is measured on unseen sources: whether the edit is applied, whether shape and colour are
kept, whether an edit without the trigger still keeps the whole badge, and what becomes of prompts without an image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.report import RESULTS, ROOT, WORK, measured_here, record
from benchmarks.varied_demo import Place, Variant, VariedDemo, anchor_prompts, run_variants, sections, sheet, spread
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition, encode_texts
from dopsd_core.conditioning.teachers import EDIT_TARGET, NO_SENTENCE
from dopsd_core.data.captions import PLACEHOLDER
from dopsd_core.data.dataset import Pair, read_dataset
from dopsd_core.demo.concept import Concept, make_concept
from dopsd_core.demo.world import APPEARANCE, HELD_OUT, IMAGE_SIZE, LAYOUT, TRIGGER, Scenes, caption, render
from dopsd_core.families import Z_IMAGE
from dopsd_core.image_grid import Row, to_images
from dopsd_core.standalone.comparison.experiment import Plan
from dopsd_core.standalone.comparison.methods import DOPSD, REFERENCES, Method
from dopsd_core.standalone.demo import Demo, PromptConditions
from dopsd_core.standalone.evaluate import Samples, Scores
from dopsd_core.standalone.hosts.demo import DemoModel, StandaloneEncoder, with_lora
from dopsd_core.standalone.judge import Judge, judged_right
from dopsd_core.training.rng import make_generator
from dopsd_core.training.training_set import TrainingSet, build_training_set

KEPT = ("shape", "colour")
"""What the edit leaves as it is in the source."""

SHOWN = 5


class Editor:
    """The demo's encoder as that of an editing model: of its reference images it reads the last."""

    def __init__(self, encoder: StandaloneEncoder) -> None:
        self._encoder = encoder

    @property
    def identity(self) -> str:
        """That of the encoder, which encodes everything."""
        return f"{self._encoder.identity}/last-reference"

    def encode_text(self, caption: str) -> Condition:
        """Features [L, D] of the caption."""
        return self._encoder.encode_text(caption)

    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """Features [L, D] of image [3, H, W] in [0, 1] and caption."""
        return self._encoder.encode_image_text(image, caption)

    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [16, H/8, W/8]."""
        return self._encoder.encode_latent(image)

    def encode_with_references(self, images: Sequence[Tensor], caption: str) -> Condition:
        """Features [L, D] of the last of the images [3, H, W] in [0, 1] and the caption."""
        return self.encode_image_text(images[-1], caption)


@dataclass(frozen=True)
class EditScores(Scores):
    """The demo's scores, of which the concept is the edit, and those of edits; shares in 0..1.

    Attributes:
        source_lost: shape or colour not the source's, in edits with the trigger.
        layout_wrong: position or background not that of prompt and source, in the same edits.
        others_wrong: appearance not the source's, in edits without the trigger.
        edit_leak: texture and center of the edit, in edits without the trigger.
    """

    source_lost: float
    layout_wrong: float
    others_wrong: float
    edit_leak: float


@dataclass(frozen=True, eq=False)
class EditSamples(Samples):
    """The demo's samples, of which those with the trigger are edits, and other edits.

    Attributes:
        other: edits of the same sources without the trigger, [n, 3, 64, 64] in [0, 1].
    """

    other: Tensor


class EditDemo(VariedDemo):
    """The demo of an edit."""

    def _prepare(self) -> tuple[PromptConditions, TrainingSet]:
        concept, encoder = self.concept, Editor(self.model.encoder)
        report = read_dataset(
            self.output / "dataset", trigger=TRIGGER, pixel_budget=IMAGE_SIZE**2, multiple=Z_IMAGE.pixel_multiple
        )
        report.raise_for_errors()
        data = self.training_set(report.pairs, ConditionCache(self.output / "cache"))
        texts, wanted = concept.unseen.texts, concept.unseen.scenes
        self.sources = sources_of(wanted, concept.seed, "unseen")
        before, after = render(self.sources), render(wanted)
        edits = [encoder.encode_with_references([image], text) for image, text in zip(before, texts, strict=True)]
        taught = [
            encoder.encode_with_references(images, text)
            for *images, text in zip(before, after, texts, strict=True)
        ]  # fmt: skip
        self._others = [
            encoder.encode_with_references([image], without_trigger(text))
            for image, text in zip(before, texts, strict=True)
        ]
        kinds = (concept.described, concept.generic, concept.named)
        described, generic, named = ([encoder.encode_text(text) for text in prompts.texts] for prompts in kinds)
        return PromptConditions(edits, described, generic, named, taught), data

    def training_set(self, pairs: Sequence[Pair], cache: ConditionCache) -> TrainingSet:
        """The pairs with the teacher edit_target and the variant's anchors."""
        encoder = Editor(self.model.encoder)
        data = build_training_set(
            pairs, encoder, cache, teacher=EDIT_TARGET.with_sentence(NO_SENTENCE), trigger=TRIGGER, anchors=True,
            anchor_prompts=anchor_prompts(self.concept, self.variant.anchors),
        )  # fmt: skip
        if self.variant.anchors != "alone":
            return data
        return replace(data, anchors=encode_texts(anchor_prompts(self.concept, "all"), encoder, cache))

    def samples(self, seed: int, lora: Path | None = None) -> EditSamples:
        """Samples of the model, with a LoRA if one is given."""
        usual = super().samples(seed, lora)
        with with_lora(self.model.denoiser, lora) if lora else nullcontext():
            return EditSamples(**vars(usual), other=self.draw(self._others, seed + 4000))

    def score(self, samples: Samples) -> Scores:
        """The judge's scores of the samples, with those of edits."""
        if not isinstance(samples, EditSamples):
            raise TypeError("the samples lack the edits without the trigger")
        wanted, before = self.concept.unseen.scenes.labels(), self.sources.labels()
        edited = judged_right(self.judge, samples.trigger, wanted)
        kept = judged_right(self.judge, samples.other, before)
        leaked = judged_right(self.judge, samples.other, {name: wanted[name] for name in self.concept.decided})
        return EditScores(
            **asdict(super().score(samples)),
            source_lost=1 - share(edited, KEPT),
            layout_wrong=1 - share(edited, LAYOUT),
            others_wrong=1 - share(kept, APPEARANCE),
            edit_leak=share(leaked, self.concept.decided),
        )


def share(found: dict[str, Tensor], names: Sequence[str]) -> float:
    """Mean over the attributes of the share of bool [n] that is true."""
    return mean(float(found[name].float().mean()) for name in names)


def without_trigger(text: str) -> str:
    """The prompt without the trigger."""
    return text.replace(f"{TRIGGER} ", "")


def sources_of(targets: Scenes, seed: int, key: str) -> Scenes:
    """The targets before the edit: an ordinary texture and an ordinary center, neither of them the edit's."""
    generator = make_generator(seed, f"demo edit, {key}")
    ordinary = (~HELD_OUT).nonzero()
    ordinary = ordinary[ordinary[:, 1] != ordinary[:, 2]]
    chosen = []
    for shape, colour, center, texture in torch.stack([getattr(targets, name) for name in APPEARANCE], 1):
        is_source = (ordinary[:, 0] == shape) & (ordinary[:, 1] == colour)
        found = ordinary[is_source & (ordinary[:, 2] != center) & (ordinary[:, 3] != texture)]
        chosen.append(found[int(torch.randint(len(found), (), generator=generator))])
    drawn = torch.stack(chosen)
    return replace(targets, center=drawn[:, 2], texture=drawn[:, 3])


def edit_of(seed: int) -> Concept:
    """The edit of a seed: the style of that seed, put on badges; its prompts name no shape and colour."""
    concept = make_concept(seed, style=True, num_unseen=60, num_prior=32)
    scenes = concept.unseen.scenes
    texts = tuple(caption(scenes, i, name=TRIGGER) for i in range(len(scenes)))
    return replace(concept, unseen=replace(concept.unseen, texts=texts))


def write_pairs(concept: Concept, folder: Path) -> None:
    """The training pairs as a user's folder of source and target, with a caption beside each target."""
    for name, scenes in (("source", sources_of(concept.targets, concept.seed, "targets")), ("target", concept.targets)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(to_images(render(scenes))):
            image.save(folder / name / f"pair_{i + 1}.png")
    for i in range(len(concept.targets)):
        text = caption(concept.targets, i, name=PLACEHOLDER)
        (folder / "target" / f"pair_{i + 1}.txt").write_text(text + "\n", encoding="utf-8")


def make_demo(model: DemoModel, judge: Judge, seed: int, variant: Variant, folder: Path) -> Demo:
    """The demo of an edit in a folder."""
    concept = edit_of(seed)
    write_pairs(concept, folder / "dataset")
    return EditDemo(model, judge, concept, folder, variant)


def variants_of(steps: int) -> tuple[Variant, ...]:
    """The trainings; steps: of all but those that say so.

    Twice as many are as much work with one of K = 2 rollout steps, and as many on pairs with three quarters of anchors.
    """
    by_gap = {"grad_steps": 1, "step_draw": "gap"}

    def anchored(share: float, title: str, **more: int) -> Method:
        name = f"anchors{share * 100:.0f}{'long' if more else ''}"
        return Method(name, title, {"anchor_probability": share, **more})

    return (
        Variant(DOPSD),
        Variant(Method("by_gap", "one rollout step by gap, 1.5 times the steps", {**by_gap, "steps": steps * 3 // 2})),
        Variant(Method("by_gap2", "one rollout step by gap, twice the steps", {**by_gap, "steps": 2 * steps})),
        Variant(Method("alone", "anchors: prompts without images"), anchors="alone"),
        Variant(anchored(0.25, "anchors on 1/4 of the batches")),
        Variant(anchored(0.75, "anchors on 3/4")),
        Variant(Method("sft", "SFT", {"objective": "sft", "lr": 1e-3})),
        Variant(anchored(0.75, "anchors on 3/4, twice the steps", steps=2 * steps)),
    )


PLACE = Place(
    "aims-edit",
    "Aims: edit",
    "D-OPSD",
    (
        "The demo's text encoder reads the source, or for the teacher the target, in place of an editing branch. The "
        "edit sets texture and center and keeps shape, colour, place and background; 4 training pairs, 60 unseen "
        "sources. Other edits: the same sources and prompts without the trigger, which keep the badge.",
        "![The source, and each model's edit of it; the last three without the trigger](aims_edit.png)",
    ),
    {
        "concept_error": "edit not applied",
        "source_lost": "source lost",
        "layout_wrong": "place or background wrong",
        "sharpness": "sharpness",
        "frechet_trigger": "Fréchet, edits",
        "others_wrong": "other edits wrong",
        "edit_leak": "leakage into other edits",
        "frechet_prior": "Fréchet, prior",
        "names_wrong": "names wrong",
    },
)


def drawn_sheet(first: int, steps: int, output: Path, trained: Sequence[Variant]) -> None:
    """Writes the sheet of the first edit."""
    concept = edit_of(first)
    sources = render(sources_of(concept.unseen.scenes, first, "unseen"))
    shown = {"trigger": SHOWN, "other": 3}
    given = Row("source", "", torch.cat([spread(sources, count) for count in shown.values()]))
    variants = [*map(Variant, REFERENCES), *trained]
    drawn = sheet(variants, concept, steps, output, f"an edit, {steps} steps", shown, given)
    drawn.save(ROOT / "docs" / "aims_edit.png")


def main() -> None:
    """Trains the variants and records their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "edits")
    parser.add_argument("--concepts", type=int, default=3, help="number of edits")
    parser.add_argument("--first-concept", type=int, default=60, help="seed of the first")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--variants", type=int, default=0, help="how many of the trainings, from the first; 0 for all")
    args = parser.parse_args()
    concepts = range(args.first_concept, args.first_concept + args.concepts)
    variants = variants_of(args.steps)[: args.variants or None]
    command = f"python -m benchmarks.edits --concepts {args.concepts} --steps {args.steps}"
    command += f" --variants {args.variants}" * bool(args.variants)
    references = [Variant(method) for method in REFERENCES]
    found = run_variants(references, variants, concepts, args.steps, args.output, make_demo)
    methods = tuple(variant.method for variant in variants)
    plan = Plan(methods=methods, concepts=tuple(concepts), seeds=(0,), steps=args.steps, regimes=("steps",))
    drawn_sheet(concepts[0], args.steps, args.output, variants)
    for section in sections(PLACE, plan, found, command):
        record(measured_here(section), RESULTS)
        print(section.to_markdown())


if __name__ == "__main__":
    main()
