"""Comparisons at equal work: FLOPs are those that torch counts, and training stops at them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.arguments import parse_args
from dopsd_core.config import ConfigError
from dopsd_core.objectives import DOPSD as DopsdObjective
from dopsd_core.standalone.comparison.command import run_compare
from dopsd_core.standalone.comparison.experiment import run_plan, tune
from dopsd_core.standalone.comparison.methods import DOPSD, REFERENCES
from dopsd_core.standalone.comparison.report import grids
from dopsd_core.standalone.comparison.trials import Trial, _watcher
from dopsd_core.standalone.comparison.work import CountedDenoiser

from .test_comparison import PLAN, FakeRunner, outcome
from .toy_denoiser import ToyDenoiser, lora, make_inputs, randomise


def test_equal_work_is_run_alone_with_the_references() -> None:
    runner: Any = FakeRunner()
    plan = replace(PLAN, regimes=("work",), work=50)
    found = run_plan(plan, runner)
    assert list(found) == ["work"] and list(found["work"]) == ["untouched", "teacher", "dopsd", "sft"]
    assert {(trial.regime, trial.work) for trial in runner.trials} == {("work", 50)}
    runner.trials.clear()
    tune(plan, runner, 1, rates=(1e-3,))
    assert {(trial.regime, trial.work) for trial in runner.trials} == {("work", 50)}


class FakeDemo:
    """Its gap and error follow the forwards so far, of which each step makes 10."""

    model: Any = SimpleNamespace(denoiser=None)
    conditions: Any = SimpleNamespace(trigger=())

    def relative_gap(self, adapters: Any, seed: int) -> float:
        return 1 - adapters / 100

    def concept_error(self, adapters: Any, *_: Any) -> float:
        return 0.9 - adapters / 100


def test_equal_work_stops_at_it_and_is_measured_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedDenoiser, "cost", lambda *_: 2.0)
    demo: Any = FakeDemo()
    watcher: Any = _watcher(Trial(DOPSD, 0, 0, "work", 1000, work=40), demo)
    steps = 0
    watcher.on_preview(0, 0)
    while not watcher.should_stop():
        steps += 1
        watcher.counted.flops += 2.0 * 10
        watcher.on_preview(steps, 10 * steps)
    assert (steps, watcher.forwards) == (4, 40)
    scores = watcher.with_measured({"concept_error": 0.1})
    assert scores == pytest.approx(
        {"concept_error": 0.1, "gap at 0.25": 0.9, "error at 0.25": 0.8, "gap at 0.5": 0.8, "error at 0.5": 0.7}
        | {"gap at 1": 0.6}
    )
    references = [
        _watcher(Trial(method, 0, 0, "work"), demo).with_measured({"concept_error": 0.3}) for method in REFERENCES
    ]
    assert [scores["gap at 1"] for scores in references] == [1, 0] and references[0]["error at 0.5"] == 0.3


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_work_is_what_torch_counts(teacher: str) -> None:
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), teacher=teacher)
    randomise(adapters)
    counted: Any = CountedDenoiser(denoiser)
    with adapters.attached():
        for _ in range(2):  # the second one is not measured again
            dopsd = DopsdObjective(anchor_probability=0, grad_steps=2)
            with FlopCounterMode(display=False) as counter:
                dopsd.backward(make_inputs(denoiser, adapters))
            before = counted.flops
            dopsd.backward(make_inputs(counted, adapters))
            assert counted.flops - before == counter.get_total_flops() > 0
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_the_table_leaves_out_what_says_little_of_speed() -> None:
    scores = {"concept_error": 0.1, "prompt_following": 1.0, "gap at 1": 0.3}
    found = {
        method: [[outcome(method, c, s, regime="work", scores=scores, forwards=50.0) for s in (0, 1)] for c in (3, 4)]
        for method in ("untouched", "dopsd", "sft")
    }
    means, _ = grids("speed", replace(PLAN, regimes=("work",), work=50), {"work": found})
    assert means.columns == ("", "concept error", "gap at 1", "steps", "seconds")
    assert means.key == "compare-speed-work" and "stops at 50 forwards" in means.notes[-1]


def test_equal_work_with_other_regimes_is_refused() -> None:
    with pytest.raises(ConfigError, match="--regimes work is measured alone: leave the other regimes out"):
        run_compare(parse_args(["compare", "--regimes", "steps", "work"]))
