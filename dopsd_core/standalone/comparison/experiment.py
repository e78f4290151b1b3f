"""Runs every method on every concept with every seed, in processes of one thread each, and resumes where it stopped.

Regimes, each with the same settings for all methods: equal optimizer steps; equal wall time, by the seconds that a step
took in the first regime; equal concept error, where training stops at a common level; and, alone, equal work in FLOPs.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch

from ...demo.concept import make_concept, write_dataset
from ...demo.model_files import JUDGE_FILE, MODEL_FILE, PARENT_FILE, TEXT_ENCODER_FILE, VAE_FILE, WEIGHTS
from ..demo import Demo
from ..hosts.demo import load_demo_model
from ..judge import load_judge
from ..workers import end_with_parent
from .methods import RATES, REFERENCES, Method
from .trials import Outcome, Regime, Trial, run_trial, saved_outcome

DEVELOPMENT = 1000
"""The first seed of the concepts on which learning rates are found; none of the compared ones."""

_MOST_STEPS = 10_000
"""At equal work, which ends a run before."""

OnDone = Callable[[str, int, int], None]
"""(name of the trial, number done, total)."""

Outcomes = dict[str, list[list[Outcome]]]
"""By method: [concepts][seeds]."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        methods: the methods, the reference first.
        concepts: seeds of the concepts.
        seeds: seeds of the runs on each concept.
        style: whether the concepts are styles, else subjects.
        steps: optimizer steps of the first regime.
        regimes: the regimes, in order.
        level: the concept error at which training stops in the last regime.
        max_steps: its largest number of steps.
        check_every: its steps between two measurements.
        work: in forwards of one image, where training stops in the regime of equal work.
    """

    methods: tuple[Method, ...]
    concepts: tuple[int, ...]
    seeds: tuple[int, ...]
    style: bool = False
    steps: int = 60
    regimes: tuple[Regime, ...] = ("steps", "time", "error")
    level: float = 0.05
    max_steps: int = 240
    check_every: int = 10
    work: int = 0


class TrialRunner:
    """Runs trials in `jobs` processes; a context manager.

    Args:
        output: folder of the comparison.
        jobs: number of processes.
        fingerprint: identifies the demo's models.
        on_done: progress.
        style: whether the concepts are styles.
    """

    def __init__(self, output: Path, jobs: int, fingerprint: str, on_done: OnDone, *, style: bool = False) -> None:
        self._output, self._fingerprint, self._on_done, self._style = output, fingerprint, on_done, style
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, _start, (output, fingerprint, style))

    def __enter__(self) -> TrialRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(
        self, trials: Sequence[Trial], shown: Callable[[Trial], bool] = lambda trial: False, *, in_turn: bool = False
    ) -> list[Outcome]:
        """The outcomes, in order; those that are saved are not run again. Raises the first error of any trial.

        Args:
            trials: to run.
            shown: whether the images of a trial are kept.
            in_turn: each one alone, so that no other slows down what is timed.
        """
        for concept in dict.fromkeys(trial.concept for trial in trials):
            made = make_concept(concept, style=self._style)
            write_dataset(made, _folder(self._output, concept) / "dataset")
        waiting = []
        for trial in trials:
            outcome = saved_outcome(trial, self._output, self._fingerprint, shown(trial))
            waiting.append(outcome or self._pool.submit(_run, trial, shown(trial)))
            if in_turn and outcome is None:
                wait([waiting[-1]])
        outcomes = []
        for done, (trial, found) in enumerate(zip(trials, waiting, strict=True), 1):
            outcomes.append(found if isinstance(found, Outcome) else found.result())
            self._on_done(trial.name, done, len(trials))
        return outcomes


def trials_of(plan: Plan, regime: Regime, steps: Mapping[str, int]) -> list[Trial]:
    """Every trial of a regime, one concept after the other; steps: by method."""
    return [
        Trial(method, concept, seed, regime, steps[method.name], plan.level, plan.check_every, plan.work)
        for concept in plan.concepts
        for seed in plan.seeds
        for method in plan.methods
    ]


def run_plan(plan: Plan, runner: TrialRunner) -> dict[str, Outcomes]:
    """All outcomes by regime. Equal steps are always run, at least on the first concept and seed, one after another:
    the others need its timings.

    The untouched model and its teacher are in the first regime. That of equal work is run alone.
    """
    first = replace(plan, methods=(*REFERENCES, *plan.methods))
    if plan.regimes == ("work",):
        return {"work": _by_method(first, runner, "work", dict.fromkeys((m.name for m in first.methods), _MOST_STEPS))}
    is_asked = "steps" in plan.regimes
    if not is_asked:
        first = replace(first, concepts=plan.concepts[:1], seeds=plan.seeds[:1])
    count = dict.fromkeys((m.name for m in first.methods), plan.steps)
    by_steps = _by_method(first, runner, "steps", count, in_turn=not is_asked)
    costs = {m.name: Cost.of(by_steps[m.name]) for m in plan.methods}
    found = {"steps": {**by_steps, **_timed({m.name: by_steps[m.name] for m in plan.methods}, costs)}}
    if "time" in plan.regimes:
        steps = steps_in_equal_time(plan, costs)
        others = tuple(method for method in plan.methods if not is_asked or steps[method.name] != plan.steps)
        trained = _by_method(replace(plan, methods=others), runner, "time", steps)
        found["time"] = _timed({m.name: trained.get(m.name, by_steps[m.name]) for m in plan.methods}, costs)
    if "error" in plan.regimes:
        most = dict.fromkeys((m.name for m in plan.methods), plan.max_steps)
        found["error"] = _timed(_by_method(plan, runner, "error", most), costs)
    return found


@dataclass(frozen=True)
class Cost:
    """What a method costs, from its timings at equal steps.

    Attributes:
        step: median wall time of a step, in seconds.
        drawing: that of its class images, in seconds.
    """

    step: float
    drawing: float

    @classmethod
    def of(cls, rows: Sequence[Sequence[Outcome]]) -> Cost:
        """Of a method's outcomes at equal steps."""
        every = [outcome for row in rows for outcome in row]
        return cls(median(o.step_seconds for o in every), median(o.drawing_seconds for o in every))

    def seconds(self, steps: int) -> float:
        """Of a training with so many steps."""
        return self.drawing + steps * self.step


def steps_in_equal_time(plan: Plan, costs: Mapping[str, Cost]) -> dict[str, int]:
    """By method, the steps in the time that the reference took, less the time of its class images; at least 1."""
    budget = costs[plan.methods[0].name].seconds(plan.steps)
    return {name: max(1, round((budget - cost.drawing) / cost.step)) for name, cost in costs.items()}


def _timed(outcomes: Outcomes, costs: Mapping[str, Cost]) -> Outcomes:
    """With the seconds that the steps take by the timings: what runs beside a trial slows it down, or stops it."""
    return {
        name: [[replace(o, seconds=costs[name].seconds(o.steps)) for o in row] for row in rows]
        for name, rows in outcomes.items()
    }


def tune(
    plan: Plan, runner: TrialRunner, count: int, rates: Sequence[float] = RATES
) -> tuple[tuple[Method, ...], dict[str, dict[float, dict[str, float]]]]:
    """(every method at its best rate on `count` development concepts, the mean scores by method and rate)."""
    concepts = tuple(range(DEVELOPMENT, DEVELOPMENT + count))
    tried = [
        replace(method.at_rate(rate), name=f"{method.name}-lr{rate:g}") for method in plan.methods for rate in rates
    ]
    regime: Regime = "work" if plan.regimes == ("work",) else "steps"
    steps = dict.fromkeys((method.name for method in tried), _MOST_STEPS if regime == "work" else plan.steps)
    found = runner.run(trials_of(replace(plan, methods=tuple(tried), concepts=concepts, seeds=(0,)), regime, steps))
    scores = {
        method.name: {rate: _means(found, f"{method.name}-lr{rate:g}") for rate in rates} for method in plan.methods
    }
    return tuple(method.at_rate(best_rate(scores[method.name])) for method in plan.methods), scores


def best_rate(tried: Mapping[float, Mapping[str, float]]) -> float:
    """The rate that forgets least among those that learn the concept within 0.05 of the best one's error."""
    least = min(scores["concept_error"] for scores in tried.values())
    good = [rate for rate, scores in tried.items() if scores["concept_error"] <= least + 0.05]
    return min(good, key=lambda rate: tried[rate]["frechet_prior"])


def models_fingerprint(undistilled: bool, folder: Path = WEIGHTS) -> str:
    """Identifies the demo's weights; undistilled: whether the model before its distillation is used too."""
    digest = hashlib.sha256()
    for name in (MODEL_FILE, TEXT_ENCODER_FILE, VAE_FILE, JUDGE_FILE, *((PARENT_FILE,) if undistilled else ())):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _means(outcomes: Sequence[Outcome], method: str) -> dict[str, float]:
    rows = [outcome.scores for outcome in outcomes if outcome.method == method]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _by_method(
    plan: Plan, runner: TrialRunner, regime: Regime, steps: Mapping[str, int], *, in_turn: bool = False
) -> Outcomes:
    plan_first = "work" if plan.regimes == ("work",) else "steps"

    def is_shown(trial: Trial) -> bool:
        return regime == plan_first and (trial.concept, trial.seed) == (plan.concepts[0], plan.seeds[0])

    trials = trials_of(plan, regime, steps)
    found = {(o.method, o.concept, o.seed): o for o in runner.run(trials, is_shown, in_turn=in_turn)}
    return {m.name: [[found[m.name, c, s] for s in plan.seeds] for c in plan.concepts] for m in plan.methods}


# -- in the processes --------------------------------------------------------------------------------------------------

_worker: tuple[Path, str, bool] | None = None


def _start(output: Path, fingerprint: str, style: bool) -> None:
    global _worker
    end_with_parent()
    torch.set_num_threads(1)
    _worker = output, fingerprint, style


def _folder(output: Path, concept: int) -> Path:
    return output / f"concept-{concept}"


@lru_cache(maxsize=1)
def _demo(output: Path, concept: int, style: bool) -> Demo:
    model, judge = load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE)
    return Demo(model, judge, make_concept(concept, style=style), _folder(output, concept))


def _run(trial: Trial, keeps_images: bool) -> Outcome:
    if _worker is None:
        raise RuntimeError("the process was not started by TrialRunner")
    output, fingerprint, style = _worker
    return run_trial(trial, _demo(output, trial.concept, style), output, fingerprint, keeps_images)
