"""Learning per second on the demo model: the gap to the teacher and the concept error over the time of training.

    python -m benchmarks.learning_curves                            # all settings, 2 concepts, 5 seeds
    python -m benchmarks.learning_curves --only k4m1_gap --seeds 1 --seconds 5 --dry

All start from K = 4, batch 1 and half of the batches prior anchors, as the preset *subject* trains. Each setting has
the learning rate of a grid that leaves the smallest gap on two concepts that are not reported. A run stops after a
number of seconds of training on one thread; they are the process's CPU seconds, which are wall time on an idle core and
hardly depend on what else the machine does. Measurements do not count. What is done is not done again: the same command
resumes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.journal import Journal, Progress
from benchmarks.report import RESULTS, ROOT, WORK, Section, Table, measured_here, record
from dopsd_core.config import TrainConfig
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.settings import demo_config
from dopsd_core.metrics.intervals import Interval, nested_bootstrap
from dopsd_core.options import changed
from dopsd_core.standalone.comparison.experiment import DEVELOPMENT
from dopsd_core.standalone.demo import Demo
from dopsd_core.standalone.hosts.demo import load_demo_model
from dopsd_core.standalone.judge import load_judge
from dopsd_core.trainable import Trainable
from dopsd_core.training.trainer import NoCallbacks

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TRIED_ON = (DEVELOPMENT, DEVELOPMENT + 1)
"""Seeds of the concepts on which learning rates are found."""

MARKS = 8
"""Measurements per run, at equal distances in time."""

LEVEL = 0.2
"""The gap whose time is in the table."""

_CHECKED_PROMPTS, _CHECK_SEED, _MOST_STEPS = 16, 50_000, 10_000
JOURNAL = WORK.parent / "learning-curves.jsonl"
PLOT = "learning_curves.png"


@dataclass(frozen=True)
class Setting:
    """A way to train.

    Attributes:
        name: unique.
        title: in the table.
        options: by flat name, over K = 4 and batch 1.
    """

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, rate: float, seed: int) -> TrainConfig:
        """The configuration of a run that is stopped by time; without warm-up, which would take more of fewer steps."""
        base = demo_config(steps=_MOST_STEPS, seed=seed)
        schedule = base.schedule.replace(warmup=0)
        base = base.replace(probe_every=0, preview_every=1, checkpoint_every=_MOST_STEPS, schedule=schedule)
        return changed(base, {"rollout_steps": 4, "batch_size": 1, "lr": rate, **self.options})


SETTINGS = (
    Setting("k4", "K = 4"),
    Setting("k4m2_gap", "m = 2 of K = 4, by gap", {"grad_steps": 2, "step_draw": "gap"}),
    Setting("k4m1", "m = 1 of K = 4", {"grad_steps": 1}),
    Setting("k4m1_gap", "m = 1 of K = 4, by gap", {"grad_steps": 1, "step_draw": "gap"}),
    Setting("k2", "K = 2", {"rollout_steps": 2}),
    Setting("k2m1_gap", "m = 1 of K = 2, by gap", {"rollout_steps": 2, "grad_steps": 1, "step_draw": "gap"}),
    Setting("frozen", "frozen teacher", {"teacher": "frozen"}),
    Setting("batch4", "batch 4", {"batch_size": 4}),
    Setting("accumulated", "4 batches accumulated", {"grad_accumulation": 4}),
)
"""The first is what the others are compared with."""


class Clock(NoCallbacks):
    """Measures at equal distances of training time, and stops after all of it.

    Attributes:
        seconds: of training so far.
        curve: (seconds, gap, concept error) of each measurement, the first one before training.
    """

    def __init__(self, demo: Demo, config: TrainConfig, budget: float) -> None:
        self._demo, self._config, self._budget = demo, config, budget
        self._since = 0.0
        self.seconds, self.steps = 0.0, 0
        self.curve: list[tuple[float, float, float]] = []

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Counts the time since the last call, and measures where a mark is passed."""
        if step:
            self.seconds += time.process_time() - self._since
        self.steps = step
        if self.seconds >= len(self.curve) * self._budget / MARKS and not self.should_stop():
            gap = self._demo.relative_gap(adapters, _CHECK_SEED)
            error = self._demo.concept_error(adapters, self._config, _CHECK_SEED, _CHECKED_PROMPTS, False)
            self.curve.append((self.seconds, gap, error))
        self._since = time.process_time()

    def should_stop(self) -> bool:
        """Whether the last mark is measured."""
        return len(self.curve) > MARKS


def at_marks(curve: Sequence[Sequence[float]], budget: float, figure: int) -> list[float]:
    """The figure (1: gap, 2: error) of a curve at the marks 0, budget / MARKS, ..., budget, read off straight lines."""
    times = [budget * mark / MARKS for mark in range(MARKS + 1)]
    return [_read(curve, wanted, figure) for wanted in times]


def _read(curve: Sequence[Sequence[float]], wanted: float, figure: int) -> float:
    for before, after in zip(curve, curve[1:], strict=False):
        if before[0] <= wanted <= after[0]:
            share = (wanted - before[0]) / max(after[0] - before[0], 1e-9)
            return before[figure] + share * (after[figure] - before[figure])
    return curve[-1][figure]


def seconds_to(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """When the gap of a curve first is at most `level`, read off straight lines; None if it never is."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after[1] <= level:
            share = (before[1] - level) / max(before[1] - after[1], 1e-9)
            return before[0] + min(max(share, 0.0), 1.0) * (after[0] - before[0])
    return None


class Runs:
    """Runs settings, and remembers them in a journal.

    Args:
        journal: of what was run.
        budget: seconds of training per run.
        folder: for datasets and runs.
    """

    def __init__(self, journal: Journal, budget: float, folder: Path) -> None:
        self._journal, self._budget, self._folder = journal, budget, folder
        self._demos: dict[int, Demo] = {}

    def row(self, setting: Setting, rate: float, concept: int, seed: int) -> dict[str, Any]:
        """The curve, steps and scores of a run."""
        config = setting.config(rate, seed)
        key = {"setting": setting.name, "rate": rate, "concept": concept, "seed": seed, "seconds": self._budget}
        for row in self._journal.rows:
            if row["key"] == key:
                return row
        demo = self._demo(concept)
        clock = Clock(demo, config, self._budget)
        lora = demo.train(f"{setting.name}-{rate:g}-{seed}-{time.time_ns()}", config, clock)
        scores = asdict(demo.score(demo.samples(seed, lora)))
        row = {"key": key, "curve": clock.curve, "steps": clock.steps, "scores": scores}
        self._journal.append(row)
        return row

    def _demo(self, concept: int) -> Demo:
        if concept not in self._demos:
            made, folder = make_concept(concept), self._folder / f"concept-{concept}"
            write_dataset(made, folder / "dataset")
            self._demos = {concept: Demo(load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE), made, folder)}
        return self._demos[concept]


def best_rate(rows: Mapping[float, Sequence[Mapping[str, Any]]], budget: float) -> float:
    """The rate with the smallest mean gap of its runs over the marks after the first half of the time."""
    late = {rate: [at_marks(row["curve"], budget, 1)[MARKS // 2 :] for row in of] for rate, of in rows.items()}
    return min(rows, key=lambda rate: mean(gap for gaps in late[rate] for gap in gaps))


Rows = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""By setting: [concepts][seeds]."""


def figures(row: Mapping[str, Any], budget: float) -> dict[str, float]:
    """What the table shows of a run. A gap that is not reached counts as the whole time."""
    gaps, errors = (at_marks(row["curve"], budget, figure) for figure in (1, 2))
    reached = seconds_to(row["curve"], LEVEL)
    return {
        "steps": row["steps"],
        "gap at 1/4": gaps[MARKS // 4],
        "gap at 1/2": gaps[MARKS // 2],
        "gap at the end": gaps[-1],
        "error at 1/4": errors[MARKS // 4],
        "error at 1/2": errors[MARKS // 2],
        f"seconds to gap {LEVEL:g}": budget if reached is None else min(reached, budget),
        "concept error": row["scores"]["concept_error"],
        "sharpness": row["scores"]["sharpness"],
        "Fréchet, prior": row["scores"]["frechet_prior"],
        "leakage": row["scores"]["leak"],
    }


def sections(rows: Rows, rates: Mapping[str, float], budget: float, command: str) -> list[Section]:
    """Means, and paired differences from the first setting."""
    titles = {setting.name: setting.title for setting in SETTINGS}
    values = {
        name: {
            figure: torch.tensor([[figures(row, budget)[figure] for row in seeds] for seeds in concepts])
            for figure in figures(concepts[0][0], budget)
        }
        for name, concepts in rows.items()
    }
    reference = next(iter(rows))
    columns = ("", *values[reference])
    means = [(titles[name], *(_mean(nested_bootstrap(v)) for v in of.values())) for name, of in values.items()]
    others = [
        (titles[name], *(_difference(nested_bootstrap(v - values[reference][f])) for f, v in of.items()))
        for name, of in values.items()
        if name != reference
    ]
    concepts, seeds = len(rows[reference]), len(rows[reference][0])
    late = {n: sum(seconds_to(r["curve"], LEVEL) is None for c in rows[n] for r in c) for n in rows}
    missed = "; ".join(f"{titles[n]} {count} of {concepts * seeds}" for n, count in late.items() if count)
    over = "one concept" if concepts == 1 else f"{concepts} concepts"
    notes = (
        f"{budget:g} seconds of training on one thread each. Means with 95 % bootstrap intervals over {over} and "
        f"{seeds} seeds of each. Gap: to the untouched model that sees a target, on unseen prompts along the demo "
        "model's own two steps, relative to before training.",
        f"A gap of {LEVEL:g} was not reached, and counts as {budget:g} seconds: {missed or 'never'}.",
        "Learning rates: " + "; ".join(f"{titles[name]}: {rates[name]:g}" for name in rows) + ".",
        f"![Gap and concept error over the seconds of training]({PLOT})",
    )
    paired = (f"Differences from {titles[reference]} on the same concept and seed. Bold: the interval excludes 0.",)
    title = "Learning per second"
    return [
        Section("learning-curves", title, command, None, Table(columns, tuple(means)), notes),
        Section(
            "learning-curves-differences",
            f"{title}: differences from {titles[reference]}",
            command,
            None,
            Table(columns, tuple(others)),
            paired,
        ),
    ]


def _mean(found: Interval) -> str:
    return f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _difference(found: Interval) -> str:
    text = f"{found.mean:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"
    return f"**{text}**" if found.excludes_zero else text


def plot(rows: Rows, budget: float, path: Path) -> None:
    """Draws the mean gap and concept error of each setting over time, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {setting.name: setting.title for setting in SETTINGS}
    times = [budget * mark / MARKS for mark in range(MARKS + 1)]
    panels, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for axis, figure, title in zip(axes, (1, 2), ("gap to the teacher, unseen prompts", "concept error"), strict=True):
        for name, concepts in rows.items():
            curves = torch.tensor([[at_marks(row["curve"], budget, figure) for row in seeds] for seeds in concepts])
            found = [nested_bootstrap(curves[:, :, mark], resamples=1000) for mark in range(MARKS + 1)]
            (line,) = axis.plot(times, [f.mean for f in found], label=titles[name])
            axis.fill_between(times, [f.low for f in found], [f.high for f in found], color=line.get_color(), alpha=0.1)
        axis.set(title=title, xlabel="seconds of training, one thread", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    panels.savefig(path, dpi=110)
    plt.close(panels)


def main() -> None:
    """Finds the learning rates, runs all settings, and records tables and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these settings, and k4")
    parser.add_argument("--concepts", type=int, default=2, help="number of concepts")
    parser.add_argument("--seeds", type=int, default=5, help="runs per concept and setting")
    parser.add_argument("--seconds", type=float, default=12.0, help="of training per run")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to choose from")
    parser.add_argument("--dry", action="store_true", help="print the tables instead of writing docs/results.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [s for s in SETTINGS if not args.only or s.name in args.only or s == SETTINGS[0]]
    runs = Runs(Journal.open(JOURNAL), args.seconds, WORK.parent / "learning-curves")
    done, total = 0, len(chosen) * (len(TRIED_ON) * len(args.rates) + args.concepts * args.seeds)
    progress = Progress("learning curves", total)

    def run(setting: Setting, rate: float, concept: int, seed: int) -> dict[str, Any]:
        nonlocal done
        row = runs.row(setting, rate, concept, seed)
        done += 1
        progress.show(done, f"{setting.name}, {rate:g}, concept {concept}, seed {seed}: {row['curve'][-1][1]:.3f}")
        return row

    tried = {s.name: {rate: [run(s, rate, concept, 0) for concept in TRIED_ON] for rate in args.rates} for s in chosen}
    rates = {name: best_rate(rows, args.seconds) for name, rows in tried.items()}
    rows: dict[str, list[list[Mapping[str, Any]]]] = {setting.name: [] for setting in chosen}
    for concept in range(args.concepts):
        for setting in chosen:
            rows[setting.name].append([run(setting, rates[setting.name], concept, s) for s in range(args.seeds)])
    words = ("--concepts", args.concepts, "--seeds", args.seeds, "--seconds", f"{args.seconds:g}")
    words += ("--only", *args.only) if args.only else ()
    words += ("--rates", *args.rates) if tuple(args.rates) != RATES else ()
    command = " ".join(map(str, ("python -m benchmarks.learning_curves", *words)))
    made = sections(rows, rates, args.seconds, command)
    if not args.dry:
        plot(rows, args.seconds, ROOT / "docs" / PLOT)
    for section in made:
        found = measured_here(section)
        if not args.dry:
            record(found, RESULTS)
        print(found.to_markdown())


if __name__ == "__main__":
    main()
