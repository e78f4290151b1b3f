"""LoRA, DoRA and LoKr on the demo model: which learns and keeps best at equal parameters and at equal cost.

    python -m benchmarks.adapters --concepts 3 --seeds 1 --steps 30

The methods are those of `python -m dopsd_core compare --preset adapters`. Each adapter's learning rate is found on
another concept, from the same grid. Cost is CPU time per step in one thread, measured in turn, so that other work on
the machine slows all of them alike; at equal cost each adapter has the steps that it can do in the time of LoRA's.
Trainings that are in --output already are not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.report import RESULTS, ROOT, WORK, Section, Table, measured_here, record
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.standalone.comparison.experiment import (
    DEVELOPMENT,
    Cost,
    Outcomes,
    Plan,
    TrialRunner,
    models_fingerprint,
    run_plan,
    steps_in_equal_time,
    trials_of,
    tune,
)
from dopsd_core.standalone.comparison.methods import ADAPTERS, Method
from dopsd_core.standalone.comparison.report import grids
from dopsd_core.standalone.comparison.sheet import draw_comparison
from dopsd_core.standalone.demo import Demo
from dopsd_core.standalone.hosts.demo import load_demo_model
from dopsd_core.standalone.judge import load_judge
from dopsd_core.training.log import StepReport
from dopsd_core.training.trainer import NoCallbacks

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
ROUNDS, STEPS, WARMUP = 3, 8, 2
"""Of the measurement of cost: how often each adapter's turn comes, its steps per turn, and how many do not count."""


class _Clock(NoCallbacks):
    """Notes the CPU time of this process after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.times.append(time.process_time())

    def step_seconds(self) -> list[float]:
        """CPU seconds of the steps that count."""
        return [after - before for before, after in zip(self.times[WARMUP - 1 :], self.times[WARMUP:], strict=False)]


def costs(methods: Sequence[Method], output: Path) -> tuple[dict[str, float], dict[str, int]]:
    """(median CPU seconds of a step, number of trained parameters) by method."""
    torch.set_num_threads(1)
    concept, model = make_concept(DEVELOPMENT), load_demo_model()
    write_dataset(concept, output / "dataset")
    demo = Demo(model, load_judge(WEIGHTS / JUDGE_FILE), concept, output)
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    for turn in range(ROUNDS):
        for method in methods:
            clock = _Clock()
            name = f"{method.name}-{turn}-{time.time_ns()}"  # a finished run would not be trained again
            demo.train(name, method.config(STEPS, turn), clock)
            found[method.name] += clock.step_seconds()
    sites = model.denoiser.sites()
    families = {m.name: m.config(STEPS, 0).adapter.for_targets(demo_targets()) for m in methods}
    return (
        {name: median(seconds) for name, seconds in found.items()},
        {name: adapter.size(sites)[1] for name, adapter in families.items()},
    )


def demo_targets() -> tuple[str, ...]:
    """The layers that are trained in the demo."""
    from dopsd_core.families import Z_IMAGE

    return Z_IMAGE.lora_targets


def at_equal_cost(plan: Plan, runner: TrialRunner, cost: Mapping[str, float]) -> Outcomes:
    """Outcomes where each method has the steps that cost as much as the first one's."""
    steps = steps_in_equal_time(plan, {m.name: Cost(cost[m.name], drawing=0.0) for m in plan.methods})
    trials = trials_of(plan, "time", steps)
    found = {(o.method, o.concept, o.seed): o for o in runner.run(trials)}
    return {m.name: [[found[m.name, c, s] for s in plan.seeds] for c in plan.concepts] for m in plan.methods}


def sections(
    plan: Plan, found: Mapping[str, Outcomes], cost: Mapping[str, float], sizes: Mapping[str, int], command: str
) -> list[Section]:
    """Sizes and costs, then means and differences from LoRA at equal steps and at equal cost."""
    first = plan.methods[0].name
    rows = tuple(
        (m.title, f"{sizes[m.name]:,}", f"{m.config(1, 0).optimizer.lr:g}", f"{cost[m.name] / cost[first]:.2f}")
        for m in plan.methods
    )
    about = Table(("adapter", "parameters", "learning rate", "CPU time of a step, LoRA = 1"), rows)
    made = [Section("adapters", "Adapters: size and cost", command, None, about)]
    for grid in grids("adapters", replace(plan, regimes=("steps", "time")), dict(found)):
        # without the wall seconds, of a shared machine, and the note about them
        table = Table(grid.columns[:-1], tuple(row[:-1] for row in grid.rows))
        title = grid.title.replace("equal wall time", "equal cost")
        made.append(Section(grid.key.replace("compare-", ""), title, command, None, table, grid.notes[:2]))
    return made


def main() -> None:
    """Tunes, trains and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "adapters")
    parser.add_argument("--concepts", type=int, default=3, help="number of concepts")
    parser.add_argument("--first-concept", type=int, default=40, help="seed of the first")
    parser.add_argument("--seeds", type=int, default=1, help="training runs per concept and adapter")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    names = [method.name for method in ADAPTERS[1:]]
    parser.add_argument("--adapters", nargs="+", choices=names, default=names, help="beside LoRA; default: all")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates that are tried")
    parser.add_argument("--jobs", type=int, default=1, help="CPU cores to use")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = tuple(method for method in ADAPTERS if method is ADAPTERS[0] or method.name in args.adapters)
    plan = Plan(
        methods=chosen, concepts=tuple(range(args.first_concept, args.first_concept + args.concepts)),
        seeds=tuple(range(args.seeds)), steps=args.steps, regimes=("steps",),
    )  # fmt: skip
    cost, sizes = costs(chosen, args.output / "cost")
    print({name: f"{seconds:.3f} s" for name, seconds in cost.items()}, sizes, flush=True)

    def show(name: str, done: int, total: int) -> None:
        print(f"{done} of {total}: {name}", flush=True)

    with TrialRunner(args.output, args.jobs, models_fingerprint(False), show) as runner:
        methods, tried = tune(plan, runner, 1, args.rates)
        plan = replace(plan, methods=methods)
        found = run_plan(plan, runner)
        found["time"] = at_equal_cost(plan, runner, cost)
    for name, rates in tried.items():
        print(name, {f"{rate:g}": (scores["concept_error"], scores["frechet_prior"]) for rate, scores in rates.items()})
    draw_comparison(plan, found, args.output).save(ROOT / "docs" / "comparison_adapters.png")
    command = f"python -m benchmarks.adapters --concepts {args.concepts} --seeds {args.seeds} --steps {args.steps}"
    command += f" --adapters {' '.join(args.adapters)} --rates {' '.join(f'{rate:g}' for rate in args.rates)}"
    for section in sections(plan, found, cost, sizes, command):
        record(measured_here(section), RESULTS)
        print(section.to_markdown())


if __name__ == "__main__":
    main()
