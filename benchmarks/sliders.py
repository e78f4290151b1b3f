"""A slider on the demo model: a LoRA whose strength is how much of a word is in the image, below 0 its opposite.

    python -m benchmarks.sliders --steps 40

The student reads "a badge, top, on a sand background", the teacher "a striped badge, ..." and no image (the mode
words). The anchors are prompts with descriptions and names. Then the share of images with the word's attribute is
measured by strength on places and backgrounds that were not trained, whether place and background are still right, and
whether badges that the words describe or name are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.report import RESULTS, ROOT, WORK, Section, Table, measured_here, record
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.teachers import WORDS
from dopsd_core.data.dataset import read_dataset
from dopsd_core.demo.concept import Concept, make_concept, write_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.settings import SAMPLE_STEPS, demo_config
from dopsd_core.demo.world import APPEARANCE, COLOURS, IMAGE_SIZE, LAYOUT, NOUN, TEXTURES, TRIGGER, caption
from dopsd_core.families import Z_IMAGE
from dopsd_core.image_grid import Row, contact_sheet
from dopsd_core.rollout import sample
from dopsd_core.standalone.hosts.demo import DemoModel, load_demo_model, with_lora
from dopsd_core.standalone.judge import Judge, judged_right, load_judge
from dopsd_core.teachers import FrozenTeacher
from dopsd_core.training.rng import make_generator
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import build_training_set

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
PROMPTS, BATCH = 48, 24
SHOWN = 6


@dataclass(frozen=True)
class Slider:
    """A word that the teacher reads.

    Attributes:
        word: before "badge".
        attribute: what it decides.
        value: the attribute's class.
    """

    word: str
    attribute: str
    value: int


SLIDERS = (
    Slider("striped", "texture", TEXTURES.index("striped")),
    Slider("dotted", "texture", TEXTURES.index("dotted")),
    Slider("red", "colour", list(COLOURS).index("red")),
)


@dataclass(frozen=True)
class Figures:
    """Shares of images in 0..1.

    Attributes:
        word: with the word's attribute, in prompts that name no appearance.
        layout: place and background right there.
        described: appearance right, in prompts that describe one.
        named: appearance right, in prompts with a bound name.
    """

    word: float
    layout: float
    described: float
    named: float


def train_slider(model: DemoModel, slider: Slider, concept: Concept, folder: Path, steps: int) -> Path:
    """Trains a slider on plain captions, and returns its file; the images only give their size."""
    write_dataset(concept, folder / "dataset")
    for i in range(len(concept.targets)):
        text = caption(concept.targets, i)
        (folder / "dataset" / f"target_{i + 1}.txt").write_text(text + "\n", encoding="utf-8")
    report = read_dataset(folder / "dataset", pixel_budget=IMAGE_SIZE**2, multiple=Z_IMAGE.pixel_multiple)
    report.raise_for_errors()
    teacher = WORDS.with_sentence(f"{NOUN} -> {slider.word} {NOUN}")
    data = build_training_set(
        report.pairs, model.encoder, ConditionCache(folder / "cache"), teacher=teacher, anchors=True,
        anchor_prompts=concept.anchors,
    )  # fmt: skip
    config = demo_config(steps=steps).replace(teacher=FrozenTeacher(), probe_every=0)
    return train(config, model.denoiser, data, folder / "run", sample_steps=SAMPLE_STEPS).lora_path


def draw(model: DemoModel, prompts: Sequence[str], seed: int) -> Tensor:
    """One image per prompt, [n, 3, 64, 64] in [0, 1], in the model's few steps."""
    conditions = [model.encoder.encode_text(prompt) for prompt in prompts]
    shape, sigmas = Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE), Z_IMAGE.sigmas(SAMPLE_STEPS, IMAGE_SIZE, IMAGE_SIZE)
    noise = torch.randn(len(prompts), *shape, generator=make_generator(seed, "slider"))
    parts = range(0, len(prompts), BATCH)
    latents = [sample(model.denoiser, conditions[i : i + BATCH], noise[i : i + BATCH], sigmas) for i in parts]
    return model.encoder.decode(torch.cat(latents))


def plain_prompts(concept: Concept) -> list[str]:
    """The prompts of the concept's unseen places and backgrounds, without its name."""
    return [text.replace(f"{TRIGGER} ", "") for text in concept.unseen.texts]


def measure(
    model: DemoModel, judge: Judge, slider: Slider, concept: Concept, lora: Path, strength: float
) -> tuple[Figures, Tensor]:
    """(figures, the first images [n, 3, 64, 64]) at a strength."""
    with with_lora(model.denoiser, lora, strength) if strength else nullcontext():
        plain = draw(model, plain_prompts(concept), 1)
        described, named = draw(model, concept.described.texts, 2), draw(model, concept.named.texts, 3)
    wanted = {slider.attribute: torch.full((len(plain),), slider.value)}
    has_word = judged_right(judge, plain, wanted)[slider.attribute]
    layout = judged_right(judge, plain, {name: getattr(concept.unseen.scenes, name) for name in LAYOUT})

    def right(images: Tensor, labels: dict[str, Tensor]) -> float:
        found = judged_right(judge, images, labels)
        return mean(float(found[name].float().mean()) for name in APPEARANCE)

    figures = Figures(
        float(has_word.float().mean()),
        mean(float(found.float().mean()) for found in layout.values()),
        right(described, concept.described.scenes.labels()),
        right(named, concept.named.scenes.labels()),
    )
    return figures, plain[:: len(plain) // SHOWN][:SHOWN]


def section(found: dict[float, list[Figures]], command: str) -> Section:
    """The figures by strength, a column for each slider's word."""
    titles = tuple(f"{slider.word}" for slider in SLIDERS)
    lines = [
        (
            f"{strength:g}",
            *(f"{figures.word:.2f}" for figures in rows),
            *(f"{mean(getattr(figures, name) for figures in rows):.2f}" for name in ("layout", "described", "named")),
        )
        for strength, rows in found.items()
    ]
    columns = ("strength", *titles, "place and background", "described badges", "named badges")
    about = (
        f"Share of images with the word's attribute in prompts without it, by the LoRA's strength; then shares that "
        f"are right, means over the {len(SLIDERS)} sliders. One training each; no interval."
    )
    image = "![A row per strength of the slider striped, the same prompts and noise](sliders.png)"
    return Section("sliders", "Sliders", command, None, Table(columns, tuple(lines)), (about, image))


def main() -> None:
    """Trains the sliders and records what their strength does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "sliders")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, judge = load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE)
    concept = make_concept(50, num_unseen=PROMPTS, num_prior=PROMPTS)
    found: dict[float, list[Figures]] = {strength: [] for strength in STRENGTHS}
    rows = []
    for slider in SLIDERS:
        lora = train_slider(model, slider, concept, args.output / f"{slider.word}-{args.steps}", args.steps)
        for strength in STRENGTHS:
            figures, images = measure(model, judge, slider, concept, lora, strength)
            found[strength].append(figures)
            print(slider.word, strength, figures, flush=True)
            if slider is SLIDERS[0]:
                rows.append(Row(f"strength {strength:g}", f"{slider.word} {figures.word:.2f}", images))
    contact_sheet(f"slider: {NOUN} -> {SLIDERS[0].word} {NOUN}", rows).save(ROOT / "docs" / "sliders.png")
    recorded = measured_here(section(found, f"python -m benchmarks.sliders --steps {args.steps}"))
    record(recorded, RESULTS)
    print(recorded.to_markdown())


if __name__ == "__main__":
    main()
