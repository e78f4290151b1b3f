"""Cost of learning with D-OPSD on the demo model: ours compared with a plain restatement of the authors' loop.

    python -m benchmarks.step_cost                                  # K = 2, 4 and 8, batch 1 and 4, 2 seeds
    python -m benchmarks.step_cost --rollout-steps 4 --seeds 5      # resumes what was measured before

The authors' step encodes both conditions and the target latent of every pair in each step and calls backward once,
with the graphs of all K rollout steps in memory. Ours encodes the conditions beforehand and calls backward after each
rollout step; the third variant backpropagates through one of the K steps, drawn by its gap. Model, LoRA, pairs, noise
and optimizer are the same, without prior anchors and without gradient checkpointing. Every variant is measured at every
learning rate, and compared with the authors' loop at the one that suits that best.

Bytes and FLOPs are counted op by op, in one step and as the mean of several. Seconds are those of the steps alone,
until the gap to the teacher on unseen prompts, measured every few steps, is at most a fifth of that before training.
Every measurement has its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counters import LiveBytes
from benchmarks.journal import Journal
from benchmarks.report import RESULTS, WORK, Section, Table, measured_here, record
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.conditioning.encode import DualCondition
from dopsd_core.data.dataset import read_dataset
from dopsd_core.data.images import load_image
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.settings import demo_config
from dopsd_core.demo.world import IMAGE_SIZE, TRIGGER
from dopsd_core.families import Z_IMAGE
from dopsd_core.objectives import DOPSD, ObjectiveInputs, measure_gap, self_distillation_loss
from dopsd_core.options import changed
from dopsd_core.rollout import rollout
from dopsd_core.standalone.hosts.demo import DemoModel, load_demo_model
from dopsd_core.training.rng import make_generator
from dopsd_core.training.step_losses import StepLosses

VARIANTS = {"authors": "authors' loop", "ours": "ours", "one": "ours, 1 of K"}
RATES = (1e-3, 2e-3)
LEVEL, PROMPTS, CHECK_EVERY, MOST_STEPS = 0.2, 8, 5, 600
JOURNAL = WORK / "step-cost.jsonl"


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        variant: one of `VARIANTS`.
        rollout_steps: K.
        batch: batch size.
        seed: of LoRA, noise and gradient steps.
        rate: learning rate.
        concept: seed of the concept.
    """

    variant: str
    rollout_steps: int
    batch: int
    seed: int
    rate: float = 2e-3
    concept: int = 0


class Bench:
    """The demo model with a LoRA on it, and the training pairs of a concept."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.setting = setting
        self.config = changed(demo_config(seed=setting.seed), {"lr": setting.rate})
        self.model: DemoModel = load_demo_model()
        concept = make_concept(setting.concept)
        write_dataset(concept, folder)
        self.sources = read_dataset(folder, trigger=TRIGGER, pixel_budget=IMAGE_SIZE**2, multiple=16).pairs
        self.sigmas = Z_IMAGE.sigmas(setting.rollout_steps, IMAGE_SIZE, IMAGE_SIZE)
        self.encoded = [self.encode(number) for number in range(len(self.sources))]
        images = [load_image(pair.image_path, pair.bucket) for pair in self.sources]
        encoder, texts = self.model.encoder, concept.unseen.texts[:PROMPTS]
        self.unseen = [
            DualCondition(encoder.encode_text(text), encoder.encode_image_text(image, text), None, text, "")
            for text, image in zip(texts, cycle(images), strict=False)
        ]
        self.begin()

    def begin(self) -> None:
        """A new LoRA and optimizer."""
        config = self.config
        self.adapters = AdapterSet(
            self.model.denoiser.sites(),
            Z_IMAGE.lora_config(config.adapter.rank),  # type: ignore[attr-defined]
            seed=config.seed,
            teacher=config.teacher,
        )
        self.optimizer = config.optimizer.build(self.adapters.parameters())
        self.losses = StepLosses(self.setting.rollout_steps)

    def encode(self, number: int) -> DualCondition:
        """The conditions and the target of a pair, computed anew."""
        pair, encoder = self.sources[number], self.model.encoder
        image, caption = load_image(pair.image_path, pair.bucket), pair.captions[0]
        student, teacher = encoder.encode_text(caption), encoder.encode_image_text(image, caption)
        return DualCondition(student, teacher, encoder.encode_latent(image), caption, "")

    def step(self, number: int) -> None:
        """Optimizer step `number`, from 0, of the variant."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(number)
        self.optimizer.zero_grad(set_to_none=True)
        first, count = number * self.setting.batch, len(self.sources)
        chosen = [(first + offset) % count for offset in range(self.setting.batch)]
        if self.setting.variant == "authors":
            self.authors([self.encode(place) for place in chosen], self.noise(number, len(chosen)))
        else:
            self.ours([self.encoded[place] for place in chosen], number)
        torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.adapters.update_teacher()

    def ours(self, pairs: Sequence[DualCondition], number: int) -> None:
        """The gradient as this project computes it, on conditions that are encoded once."""
        objective = DOPSD(anchor_probability=0)
        if self.setting.variant == "one":
            objective = objective.replace(grad_steps=1, step_draw="gap")
        self.losses.add([objective.backward(self.inputs(pairs, number))])

    def authors(self, pairs: Sequence[DualCondition], noise: torch.Tensor) -> None:
        """The authors' gradient at noise [B, C, h, w]: one backward over all rollout steps."""
        denoiser, losses = self.model.denoiser, []
        students, teachers = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
        predict = lambda x, sigma: denoiser.predict_x0(x, sigma, students)  # noqa: E731
        for state in rollout(predict, noise, self.sigmas, grad_steps=range(len(self.sigmas))):
            with self.adapters.use("teacher"), torch.no_grad():
                target = denoiser.predict_x0(state.x, state.sigma, teachers)
            losses.append(self_distillation_loss(state.x0, target, state.sigma))
        torch.stack(losses).mean().backward()

    def gap(self) -> float:
        """The gap to the teacher on unseen prompts, relative to that before training."""
        now = measure_gap(self.inputs(self.unseen, -1))
        return now.metrics["gap"] / self._untouched_gap

    @cached_property
    def _untouched_gap(self) -> float:
        before = measure_gap(self.inputs(self.unseen, -1), student_mode="off", teacher_mode="off")
        return before.metrics["gap"]

    def inputs(self, pairs: Sequence[DualCondition], number: int) -> ObjectiveInputs:
        """Of a step, or of the measurement for -1."""
        drawing = make_generator(self.setting.seed, "steps", number)
        noise = self.noise(number, len(pairs))
        return ObjectiveInputs(
            self.model.denoiser, self.adapters, pairs, noise, self.sigmas, drawing, step_losses=self.losses.known
        )

    def noise(self, number: int, count: int) -> torch.Tensor:
        """[count, C, h, w] of a step, or of the measurement for -1."""
        generator = make_generator(self.setting.seed, "noise", number)
        return torch.randn(count, *Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE), generator=generator)


def measure(bench: Bench, most_steps: int = MOST_STEPS, level: float = LEVEL) -> dict[str, float]:
    """Peak bytes and FLOPs of a step; then steps and seconds until the gap, and seconds of a step, from new weights."""
    counted = _counted_steps(bench.setting)
    with bench.adapters.attached():
        bench.step(0)
        bench.optimizer.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            bench.step(1)
        with FlopCounterMode(display=False) as flops:
            for number in range(2, 2 + counted):
                bench.step(number)
    bench.begin()
    seconds: list[float] = []
    is_reached = False
    with bench.adapters.attached():
        while len(seconds) < most_steps and not is_reached:
            began = time.perf_counter()
            bench.step(len(seconds))
            seconds.append(time.perf_counter() - began)
            is_reached = len(seconds) % CHECK_EVERY == 0 and bench.gap() <= level
    return {
        "bytes": live.peak,
        "flops": flops.get_total_flops() / counted,
        "step_seconds": median(seconds),
        "steps": len(seconds),
        "seconds": sum(seconds),
        "reached": is_reached,
    }


def _counted_steps(setting: Setting) -> int:
    """Of how many steps the FLOPs are the mean: which rollout step is drawn decides what a step costs."""
    return 4 * setting.rollout_steps if setting.variant == "one" else 1


# -- all of them -------------------------------------------------------------------------------------------------------


def run_all(settings: Sequence[Setting], journal: Journal) -> list[dict[str, Any]]:
    """The rows of the settings; those in the journal are not measured again."""
    done = {Setting(**row["setting"]): row for row in journal.rows}
    for number, setting in enumerate(settings, 1):
        if setting in done:
            continue
        began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.step_cost", "--worker", json.dumps(asdict(setting))]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            raise SystemExit(f"{setting} failed:\n{out.stderr}")
        row = {"setting": asdict(setting), **json.loads(out.stdout.splitlines()[-1])}
        journal.append(row)
        done[setting] = row
        took = time.monotonic() - began
        print(f"{number} of {len(settings)}, {took:.0f} s: {setting}, {row['steps']} steps", flush=True)
    return [done[setting] for setting in settings]


def section(rows: Sequence[Mapping[str, Any]], command: str) -> Section:
    """A row for each K, batch, variant and learning rate, with means over the seeds and what ours saves."""
    groups: dict[tuple[int, int], dict[tuple[str, float], list[Mapping[str, Any]]]] = {}
    for row in rows:
        setting = row["setting"]
        of_size = groups.setdefault((setting["rollout_steps"], setting["batch"]), {})
        of_size.setdefault((setting["variant"], setting["rate"]), []).append(row)
    cells = []
    for (k, batch), measured in sorted(groups.items()):
        authors = [found for (variant, _), found in measured.items() if variant == "authors"]
        reference = min(authors, key=_slowness, default=None)
        for variant, rate in sorted(measured, key=lambda pair: (list(VARIANTS).index(pair[0]), pair[1])):
            figures = _figures(measured[variant, rate], reference)
            cells.append((str(k), str(batch), VARIANTS[variant], f"{rate:g}", *figures))
    seeds = len({row["setting"]["seed"] for row in rows})
    notes = (
        f"Means over {seeds} seeds, {torch.get_num_threads()} threads. In parentheses: relative to the authors' loop "
        "at the learning rate with which it is there first. "
        f"The gap is that to the teacher on {PROMPTS} unseen prompts, relative to before training, measured every "
        f"{CHECK_EVERY} steps.",
        "The authors' loop encodes its conditions in every step and keeps the graphs of all K rollout steps; ours does "
        "neither. The last rows of each size backpropagate through one step, drawn by its gap. No prior anchors.",
    )
    columns = (
        "K",
        "batch",
        "step",
        "learning rate",
        "steps/s",
        "peak, MB",
        "GFLOP per step",
        f"steps to gap {LEVEL:g}",
        "seconds to it",
    )
    chosen = {k for k, _ in groups}
    only = f"-{k}" if len(chosen) == 1 else ""
    key, title = f"step-cost{only}", f"Cost of learning{f', K = {k}' if only else ''}"
    return Section(key, title, command, None, Table(columns, tuple(cells)), notes)


def _slowness(rows: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """How many runs have not reached the gap, and the mean seconds."""
    return sum(not row["reached"] for row in rows), mean(row["seconds"] for row in rows)


def _figures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
    def of(name: str, scale: float, digits: int) -> str:
        value = mean(row[name] for row in rows)
        text = f"{value / scale:.{digits}f}"
        if reference is None or reference is rows:
            return text
        return f"{text} ({value / mean(row[name] for row in reference):.2f})"

    rate = f"{1 / mean(row['step_seconds'] for row in rows):.2f}"
    if reference is not None and reference is not rows:
        times = mean(row["step_seconds"] for row in reference) / mean(row["step_seconds"] for row in rows)
        rate += f" ({times:.2f})"
    short = sum(not row["reached"] for row in rows)
    missed = f", {short} of {len(rows)} not reached" if short else ""
    return rate, of("bytes", 1e6, 0), of("flops", 1e9, 1), of("steps", 1, 0) + missed, of("seconds", 1, 1)


def main() -> None:
    """Measures all settings and records them; with --worker one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollout-steps", type=int, nargs="+", default=[2, 4, 8], metavar="K")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], metavar="B")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Bench(Path(folder), Setting(**args.worker)))
        sys.stdout.write(json.dumps(found) + "\n")
        return
    journal = Journal.open(JOURNAL, fresh=args.fresh)
    sizes = [(k, batch) for k in args.rollout_steps for batch in args.batch]
    settings = [
        Setting(variant, *size, seed, rate)
        for size in sizes
        for rate in args.rates
        for seed in range(args.seeds)
        for variant in VARIANTS
    ]
    rows = run_all(settings, journal)
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    found = measured_here(section(rows, " ".join(("python -m benchmarks.step_cost", *words))))
    record(found, RESULTS)
    print(found.to_markdown())


if __name__ == "__main__":
    main()
