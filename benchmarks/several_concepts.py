"""Several concepts in one LoRA of the demo model, against one LoRA each: concept error, cross-leakage, forgetting.

    python -m benchmarks.several_concepts --counts 1 2 4 --seeds 2 --steps 60

A dataset has a folder per concept, with its trigger in trigger.txt, as a user's has. Every concept gets the same number
of visits: a run of n concepts has n times the steps. Runs that are in --output already are not run again.

Cross-leakage is the share of another concept's attributes in images of a prompt with one trigger, where the two
concepts differ; the untouched model's is chance. A third kind of run lets every concept have the captions of the others
too, with its own trigger: the same scenes then do not tell concepts apart, only their triggers do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from benchmarks.report import RESULTS, WORK, Section, Table, measured_here, on_this_model, record
from dopsd_core.conditioning.cache import ConditionCache
from dopsd_core.conditioning.encode import Condition
from dopsd_core.data.dataset import Pair, read_dataset
from dopsd_core.data.triggers import TRIGGER_NAME
from dopsd_core.demo.concept import Concept, make_concept, write_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.names import UNBOUND
from dopsd_core.demo.settings import SAMPLE_STEPS, demo_config
from dopsd_core.demo.world import IMAGE_SIZE, TRIGGER
from dopsd_core.families import Z_IMAGE
from dopsd_core.files.atomic import write_atomic
from dopsd_core.metrics.intervals import bootstrap
from dopsd_core.rollout import sample
from dopsd_core.standalone.hosts.demo import DemoModel, load_demo_model, with_lora
from dopsd_core.standalone.judge import Judge, judged_right, load_judge
from dopsd_core.training.rng import make_generator
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import build_training_set

_WITH_INTERVAL = ", with 95 % bootstrap intervals"
PROMPTS, BATCH = 24, 24
WITH_OTHERS = "with the others' captions"


@dataclass(frozen=True)
class Figures:
    """Means over the concepts of a run.

    Attributes:
        concept_error: 1 - accuracy of a concept's attributes on unseen prompts with its trigger.
        cross_leak: share of another concept's attributes there, where the two differ; 0 for one concept.
        prior_error: 1 - accuracy of the appearance in prompts without a trigger that describe another.
        leak: share of the concepts' attributes in images of open prompts without a trigger.
    """

    concept_error: float
    cross_leak: float
    prior_error: float
    leak: float


def concepts_of_run(first: int, count: int) -> list[tuple[str, Concept]]:
    """(trigger, concept) of `count` concepts; the triggers are names that mean nothing to the model."""
    names = (TRIGGER, *(name for name in UNBOUND if name != TRIGGER))
    return [(names[i], make_concept(first + i, num_unseen=PROMPTS, num_prior=PROMPTS)) for i in range(count)]


def write_datasets(concepts: Sequence[tuple[str, Concept]], folder: Path) -> None:
    """A folder per concept with its images, captions with [V] and trigger.txt."""
    for number, (trigger, concept) in enumerate(concepts):
        write_dataset(concept, folder / f"concept-{number}")
        (folder / f"concept-{number}" / TRIGGER_NAME).write_text(trigger + "\n", encoding="utf-8")


def with_others_captions(pairs: Sequence[Pair]) -> list[Pair]:
    """Each image with the captions of the other concepts too, in which its own trigger stands."""

    def of_others(pair: Pair) -> list[str]:
        others = [other for other in pairs if other.trigger != pair.trigger]
        return [text.replace(other.trigger, pair.trigger) for other in others for text in other.captions]

    return [replace(pair, captions=(*pair.captions, *of_others(pair))) for pair in pairs]


def train_run(
    model: DemoModel, concepts: Sequence[tuple[str, Concept]], folder: Path, seed: int, mixed: bool, steps: int
) -> Path:
    """Trains one LoRA for the concepts, and returns its file."""
    write_datasets(concepts, folder / "dataset")
    report = read_dataset(folder / "dataset", pixel_budget=IMAGE_SIZE**2, multiple=Z_IMAGE.pixel_multiple)
    report.raise_for_errors()
    pairs = with_others_captions(report.pairs) if mixed else report.pairs
    cache = ConditionCache(folder / "cache")
    ordinary = concepts[0][1].anchors
    data = build_training_set(pairs, model.encoder, cache, anchors=True, anchor_prompts=ordinary)
    config = demo_config(steps=steps * len(concepts), seed=seed)
    return train(config, model.denoiser, data, folder / "run", sample_steps=SAMPLE_STEPS).lora_path


def measure(
    model: DemoModel, judge: Judge, concepts: Sequence[tuple[str, Concept]], lora: Path | None, seed: int
) -> Figures:
    """The figures of a LoRA for these concepts; None for the untouched model."""
    errors, crossed, prior, leaks = [], [], [], []
    with with_lora(model.denoiser, lora) if lora else nullcontext():
        for trigger, concept in concepts:
            images = draw(model, [text.replace(TRIGGER, trigger) for text in concept.unseen.texts], seed)
            errors.append(1 - accuracy(judge, images, concept, concept))
            crossed += [accuracy(judge, images, other, concept) for name, other in concepts if name != trigger]
            described = draw(model, concept.described.texts, seed + 1)
            found = judged_right(judge, described, concept.described.scenes.labels())
            prior.append(1 - mean(float(found[name].float().mean()) for name in concept.decided))
            generic = draw(model, concept.generic.texts, seed + 2)
            leaks.append(accuracy(judge, generic, concept, concept))
    return Figures(mean(errors), mean(crossed) if crossed else 0.0, mean(prior), mean(leaks))


def accuracy(judge: Judge, images: torch.Tensor, wanted: Concept, concept: Concept) -> float:
    """Share of the attributes of `wanted` in images [n, 3, h, w]; where that is another concept, of those in which it
    differs from `concept`."""
    own, looks = concept.targets.labels(), wanted.targets.labels()
    differing = [n for n in wanted.decided if wanted is concept or int(own[n][0]) != int(looks[n][0])]
    labels = {name: value[:1].expand(len(images)) for name, value in looks.items()}
    right = judged_right(judge, images, labels)
    return mean(float(right[name].float().mean()) for name in differing) if differing else 0.0


def draw(model: DemoModel, prompts: Sequence[str], seed: int) -> torch.Tensor:
    """One image per prompt, [n, 3, 64, 64] in [0, 1], in the model's few steps."""
    conditions: list[Condition] = [model.encoder.encode_text(prompt) for prompt in prompts]
    shape = Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    noise = torch.randn(len(prompts), *shape, generator=make_generator(seed, "several concepts"))
    sigmas = Z_IMAGE.sigmas(SAMPLE_STEPS, IMAGE_SIZE, IMAGE_SIZE)
    latents = [
        sample(model.denoiser, conditions[i : i + BATCH], noise[i : i + BATCH], sigmas)
        for i in range(0, len(prompts), BATCH)
    ]
    return model.encoder.decode(torch.cat(latents))


def run_all(
    output: Path, counts: Sequence[int], seeds: int, steps: int, is_plain: bool = False
) -> dict[str, list[Figures]]:
    """Figures of every kind of run, one per seed; each seed has concepts of its own.

    Args:
        steps: per concept.
        is_plain: whether to leave out the runs with the others' captions.
    """
    model, judge = load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE)
    found: dict[str, list[Figures]] = {}
    for count in counts:
        kinds = {"untouched": None, "": False} | ({WITH_OTHERS: True} if count > 1 and not is_plain else {})
        for kind, mixed in kinds.items():
            name = f"{count} concept{'s' * (count > 1)}{', ' * bool(kind)}{kind}"
            for seed in range(seeds):
                concepts, folder = (
                    concepts_of_run(10 * seed, count),
                    output / f"{count}-{kind or 'plain'}-{steps}-{seed}",
                )
                found.setdefault(name, []).append(_done(folder, model, judge, concepts, seed, mixed, steps))
                print(name, seed, found[name][-1], flush=True)
    return found


def _done(
    folder: Path, model: DemoModel, judge: Judge, concepts: Sequence[tuple[str, Concept]], seed: int,
    mixed: bool | None, steps: int,
) -> Figures:  # fmt: skip
    """The figures of a run, from its folder if they are there. mixed: None for the untouched model."""
    file = folder / "figures.json"
    if file.exists():
        return Figures(**json.loads(file.read_text(encoding="utf-8")))
    lora = None if mixed is None else train_run(model, concepts, folder, seed, mixed, steps)
    figures = measure(model, judge, concepts, lora, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(asdict(figures)).encode())
    return figures


def _shown(values: Sequence[float]) -> str:
    """The mean, and over several sets of concepts its bootstrap interval."""
    found = bootstrap(values)
    interval = f" [{found.low:.3g}, {found.high:.3g}]" if len(values) > 1 else ""
    return f"{found.mean:.3g}{interval}"


def section(found: Mapping[str, Sequence[Figures]], command: str, seeds: int, steps: int) -> Section:
    """Mean of every figure over the seeds with its interval, and the largest cross-leakage."""
    lines = []
    for name, runs in found.items():
        cells = [_shown([getattr(run, figure) for run in runs]) for figure in Figures.__dataclass_fields__]
        worst = max(run.cross_leak for run in runs)
        if name.startswith("1 "):
            cells[1], shown = "-", "-"
        else:
            shown = f"{worst:.3g}"
        lines.append((name, *cells, shown))
    return Section(
        "several-concepts", "Several concepts in one run", command, None,
        Table(("run", "concept error", "cross-leakage", "prior error", "leakage", "worst cross-leakage"), tuple(lines)),
        (
            f"Mean over {'one set' if seeds == 1 else f'{seeds} sets'} of concepts{_WITH_INTERVAL * (seeds > 1)}, "
            f"{PROMPTS} unseen prompts each; {steps} steps per concept. Cross-leakage is the share of another "
            "concept's attributes, where they differ, in images of a prompt with one trigger; compare it with the "
            "untouched model's.",
        ),
    )  # fmt: skip


def main() -> None:
    """Trains one, two and four concepts at once, and records errors and leaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "several-concepts")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="concepts in a run")
    parser.add_argument("--seeds", type=int, default=2, help="sets of concepts")
    parser.add_argument("--steps", type=int, default=60, help="steps per concept")
    parser.add_argument("--plain", action="store_true", help="without the runs with the others' captions")
    args = parser.parse_args()
    found = run_all(on_this_model(args.output), args.counts, args.seeds, args.steps, args.plain)
    options = f"--counts {' '.join(map(str, args.counts))} --seeds {args.seeds} --steps {args.steps}"
    options += " --plain" * args.plain
    command = f"python -m benchmarks.several_concepts {options}"
    recorded = measured_here(section(found, command, args.seeds, args.steps))
    record(recorded, RESULTS)
    print(recorded.to_markdown())


if __name__ == "__main__":
    main()
