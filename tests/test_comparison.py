"""The comparison of methods: intervals by hand, equal budgets, records that are taken up, a small run."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.compare import sections
from dopsd_core.__main__ import main
from dopsd_core.config import ConfigError
from dopsd_core.demo.concept import make_concept
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.world import APPEARANCE
from dopsd_core.families import Z_IMAGE
from dopsd_core.metrics.intervals import nested_bootstrap
from dopsd_core.options import flattened
from dopsd_core.standalone.comparison.command import load_grids
from dopsd_core.standalone.comparison.experiment import (
    Cost,
    Outcomes,
    Plan,
    best_rate,
    run_plan,
    steps_in_equal_time,
    trials_of,
    tune,
)
from dopsd_core.standalone.comparison.methods import (
    ADAPTERS,
    DOPSD,
    METHODS,
    PRESETS,
    Method,
    chosen_methods,
    parse_method,
)
from dopsd_core.standalone.comparison.report import grids
from dopsd_core.standalone.comparison.trials import Outcome, Trial, make_room, saved_outcome
from dopsd_core.standalone.demo import Demo
from dopsd_core.standalone.hosts.demo import load_demo_model
from dopsd_core.standalone.judge import judged_right, load_judge
from dopsd_core.teachers import FrozenTeacher

from .small_demo import small_demo

# -- intervals ---------------------------------------------------------------------------------------------------------


def test_intervals_by_hand() -> None:
    """Two concepts with 0 and 1: resampled means are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4."""
    two = torch.tensor([[0.0], [1.0]])
    assert nested_bootstrap(two) == replace(nested_bootstrap(two), mean=0.5, low=0.0, high=1.0)
    assert nested_bootstrap(two, level=0.4) == replace(nested_bootstrap(two), mean=0.5, low=0.5, high=0.5)
    assert nested_bootstrap(two.T) == nested_bootstrap(two)  # two seeds of one concept
    constant = nested_bootstrap(torch.full((3, 2), 0.25))
    assert (constant.mean, constant.low, constant.high, constant.excludes_zero) == (0.25, 0.25, 0.25, True)
    assert not nested_bootstrap(two).excludes_zero and nested_bootstrap(-1 - two).excludes_zero
    assert not nested_bootstrap(torch.full((2, 2), -3.7e-9)).excludes_zero


def test_intervals_have_the_width_of_the_concepts_spread() -> None:
    """With equal seeds only the concepts count: the bootstrap's standard error is that of a mean over C values."""
    concepts = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).expand(40, 4)
    found = nested_bootstrap(concepts)
    error = concepts[:, 0].std(unbiased=False).item() / math.sqrt(40)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert found.mean == pytest.approx(concepts.mean().item())


def test_seeds_of_a_concept_count_as_less_than_other_concepts() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert nested_bootstrap(values).low == 0.0  # eight values that look like four each, and are two
    assert nested_bootstrap(values.reshape(8, 1)).low > 0.0


@pytest.mark.parametrize("values", [torch.zeros(0, 2), torch.zeros(2), torch.tensor([[math.nan]])])
def test_intervals_of_nothing_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="finite values"):
        nested_bootstrap(values)


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_have_the_same_budget(preset: str) -> None:
    methods = PRESETS[preset]
    assert replace(methods[0], title=DOPSD.title) == DOPSD
    assert len({m.name for m in methods}) == len({m.title for m in methods}) == len(methods)
    configs = [method.config(50, 3) for method in methods]
    assert len({c.to_json() for c, m in zip(configs, methods, strict=True) if not m.undistilled}) == sum(
        not m.undistilled for m in methods
    )
    own = configs[0]
    for config in configs:
        same = replace_choices(config, own)
        assert same.replace(batch_size=own.batch_size) == own, config
    assert own.probe_every == 0 and (own.steps, own.seed) == (50, 3)
    assert METHODS[0].config(1, 0).schedule.warmup == 0


def replace_choices(config: Any, own: Any) -> Any:
    """The configuration with the choices of another one in all that a method may differ in."""
    names = ("objective", "teacher", "rollout_steps", "optimizer", "adapter", "batch_size")
    kept = {name: getattr(own, name) for name in names}
    return config.replace(**kept)


def test_adapters_are_compared_at_equal_size_and_scale() -> None:
    adapters: list[Any] = [method.config(10, 0).adapter.for_targets(Z_IMAGE.lora_targets) for method in ADAPTERS]
    sites = load_demo_model().denoiser.sites()
    sizes = [adapter.size(sites)[1] for adapter in adapters]
    assert {adapter.scale for adapter in adapters} == {1.0}
    assert all(abs(size / sizes[0] - 1) < 0.03 for size in sizes), sizes
    assert len(adapters[3].shape(256, 256).w2) == 1, "rank 64 keeps the second factor in one piece"


def test_a_method_from_the_command_line() -> None:
    method = parse_method("mine: objective=sft, sft_shift=1.5, lr=3e-4, undistilled=true")
    assert method == Method("mine", "mine", {"objective": "sft", "sft_shift": 1.5, "lr": 3e-4}, undistilled=True)
    assert flattened(parse_method("m: grad_steps=none, deterministic=true").config(9, 0))["deterministic"] is True
    chosen = chosen_methods("methods", ["sft"], ["mine: lr=1e-3"])
    assert [m.name for m in chosen] == ["dopsd", "sft", "mine"]
    assert parse_method("my_own: lr=1e-3").title == "my own"


def test_what_the_others_are_compared_with_comes_first() -> None:
    own = ["mine: lr=1e-3", "other: lr=2e-3"]
    assert [m.name for m in chosen_methods("methods", ["sft"], own, "other")] == ["other", "sft", "mine"]
    assert [m.name for m in chosen_methods("methods", ["pso"], own, "sft")] == ["sft", "pso", "mine", "other"]
    with pytest.raises(ConfigError, match="--reference: there is no method 'them'; choose from dopsd, .*, mine, other"):
        chosen_methods("methods", ["sft"], own, "them")


@pytest.mark.parametrize("name", ["untouched", "teacher", "its_teacher", "velocity_loss"])
def test_no_two_rows_of_a_table_have_one_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--method {name}: the tables have a row of that name"):
        chosen_methods("ablations", ["velocity"], [f"{name}: lr=1e-3"])


def test_a_reference_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dopsd_core.standalone.comparison.command.WEIGHTS", tmp_path)
    assert main(["compare", "--reference", "sft_on_base", "--output", str(tmp_path / "out")]) != 0
    assert "--reference sft_on_base trains the undistilled demo model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft", '--method is .sft.; write "name: option=value'),
        ("a b: lr=1", "--method is"),
        ("m: lr", "--method is"),
        ("m: lr=2", "lr is 2.0"),
        ("m: lrr=1", "there is no option lrr; did you mean lr?"),
        ("m: grad_steps=1_0", "grad_steps is '1_0', it must be a whole number"),
        ("m: deterministic=yes", "deterministic is 'yes', it must be true or false"),
        ("m: undistilled=yes", "undistilled is 'yes'; write true or false"),
        ("m: lr=1e-4, lr=1e-3", "--method m has an option twice"),
        ("m: sft_shift=1", "sft_shift is an option of objective sft, and objective is dopsd"),
    ],
)
def test_wrong_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_method(text)


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no method sfft; choose from dopsd, "):
        chosen_methods("methods", ["sfft"], [])
    with pytest.raises(ConfigError, match="the method sft is given twice"):
        chosen_methods("methods", [], ["sft: lr=1e-3"])


def test_the_best_rate_forgets_least_among_those_that_learn() -> None:
    tried = {
        1e-4: {"concept_error": 0.5, "frechet_prior": 10.0},
        1e-3: {"concept_error": 0.04, "frechet_prior": 200.0},
        2e-3: {"concept_error": 0.0, "frechet_prior": 900.0},
    }
    assert best_rate(tried) == 1e-3
    assert best_rate({rate: tried[rate] for rate in (1e-4, 2e-3)}) == 2e-3


class FakeRunner:
    """Gives each trial an outcome by its learning rate: the higher it is, the better learned and the more forgotten."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.in_turn: list[Trial] = []

    def run(self, trials: Any, shown: Any = None, *, in_turn: bool = False) -> list[Outcome]:
        self.trials += trials
        self.in_turn += trials if in_turn else []
        return [self.outcome(trial) for trial in trials]

    def outcome(self, trial: Trial) -> Outcome:
        rate = trial.config().optimizer.lr
        scores = {"concept_error": max(0.0, 0.5 - 400 * rate), "frechet_prior": 1e5 * rate}
        return outcome(trial.method.name, trial.concept, trial.seed, scores=scores, regime=trial.regime)


def test_tuning_tries_the_same_rates_for_every_method_on_other_concepts() -> None:
    runner: Any = FakeRunner()
    methods, tried = tune(PLAN, runner, 2, rates=(1e-4, 1e-3, 2e-3))
    assert [m.config(10, 0).optimizer.lr for m in methods] == [2e-3, 2e-3]
    assert [m.name for m in methods] == ["dopsd", "sft"] and methods[1].config(10, 0).objective.name == "sft"
    assert tried["sft"][1e-3] == pytest.approx({"concept_error": 0.1, "frechet_prior": 100.0})
    assert len(runner.trials) == 2 * 3 * 2 and {trial.concept for trial in runner.trials} == {1000, 1001}


def test_a_plan_runs_only_its_regimes_and_reuses_runs_that_are_the_same() -> None:
    runner: Any = FakeRunner()
    found = run_plan(replace(PLAN, regimes=("steps", "time"), max_steps=40), runner)
    assert list(found) == ["steps", "time"] and list(found["steps"]) == ["untouched", "teacher", "dopsd", "sft"]
    assert {trial.regime for trial in runner.trials} == {"steps"}  # every step took the same time
    assert found["time"]["sft"] == found["steps"]["sft"]
    found = run_plan(replace(PLAN, regimes=("error",), max_steps=40), runner)
    assert {trial.steps for trial in runner.trials if trial.regime == "error"} == {40} and "time" not in found


def test_where_equal_steps_are_not_asked_for_they_are_only_timed() -> None:
    runner: Any = FakeRunner()
    found = run_plan(replace(PLAN, regimes=("time",)), runner)
    timed = [(trial.method.name, trial.concept, trial.seed) for trial in runner.trials if trial.regime == "steps"]
    assert timed == [(name, 3, 0) for name in ("untouched", "teacher", "dopsd", "sft")]
    assert [trial for trial in runner.trials if trial.regime == "steps"] == runner.in_turn
    assert all(len(found["time"][name]) == len(found["time"][name][0]) == 2 for name in ("dopsd", "sft"))
    means, *_ = grids("methods", replace(PLAN, regimes=("time",)), found)
    assert means.title == "Methods, equal wall time"


# -- plans and records -------------------------------------------------------------------------------------------------

PLAN = Plan(methods=(DOPSD, Method("sft", "SFT", {"objective": "sft"})), concepts=(3, 4), seeds=(0, 1), steps=10)


def outcome(method: str, concept: int, seed: int, error: float = 0.0, **changes: Any) -> Outcome:
    plain = Outcome(
        method=method, concept=concept, seed=seed, regime="steps", steps=10, seconds=5.0, drawing_seconds=0.0,
        step_seconds=0.5, reached=True, scores={"concept_error": error, "named": 1.0}, digest="",
    )  # fmt: skip
    return replace(plain, **changes)


def test_every_combination_is_a_trial_of_its_own() -> None:
    trials = trials_of(PLAN, "error", {"dopsd": 20, "sft": 30})
    assert len({trial.name for trial in trials}) == 8
    assert {(t.method.name, t.steps) for t in trials} == {("dopsd", 20), ("sft", 30)}
    config = trials[0].config()
    assert (config.preview_every, config.steps, config.seed) == (10, 20, 0)
    assert trials_of(PLAN, "steps", {"dopsd": 20, "sft": 30})[0].config().preview_every == 0


def test_equal_time_gives_steps_by_what_a_step_took_less_the_class_images() -> None:
    """10 steps of 0.5 s are 5 s: 20 steps of 0.25 s, or 12 after 2 s of drawing."""
    found = {
        "dopsd": [[outcome("dopsd", c, s, step_seconds=t) for s, t in enumerate((0.5, 0.5))] for c in (3, 4)],
        "sft": [[outcome("sft", c, s, step_seconds=0.25) for s in (0, 1)] for c in (3, 4)],
    }
    assert of_costs(found) == {"dopsd": 10, "sft": 20}
    drawn = [[replace(o, drawing_seconds=2.0) for o in row] for row in found["sft"]]
    assert of_costs({**found, "sft": drawn}) == {"dopsd": 10, "sft": 12}
    assert Cost.of(drawn).seconds(12) == 5.0
    slow = [[replace(o, drawing_seconds=99.0) for o in row] for row in found["sft"]]
    assert of_costs({**found, "sft": slow})["sft"] == 1


def of_costs(found: Outcomes) -> dict[str, int]:
    return steps_in_equal_time(PLAN, {name: Cost.of(rows) for name, rows in found.items()})


class Answers:
    """A runner of trials, all of which take 9 s a step but the timings."""

    def run(
        self, trials: list[Trial], shown: Callable[[Trial], bool] | None = None, *, in_turn: bool = False
    ) -> list[Outcome]:
        each = {"steps": {"dopsd": 0.5, "sft": 0.25}}
        return [
            outcome(
                t.method.name, t.concept, t.seed, regime=t.regime, steps=t.steps,
                seconds=t.steps * 9.0, step_seconds=each.get(t.regime, {}).get(t.method.name, 9.0),
            )
            for t in trials
        ]  # fmt: skip


def test_seconds_are_those_of_the_timings_whatever_ran_beside_a_trial() -> None:
    plan = replace(PLAN, steps=10, max_steps=40)
    found = run_plan(plan, Answers())  # type: ignore[arg-type]
    by_steps = {m: [o.seconds for row in rows for o in row] for m, rows in found["steps"].items()}
    assert (by_steps["dopsd"], by_steps["sft"]) == ([5.0] * 4, [2.5] * 4)
    assert {m: [o.seconds for row in rows for o in row] for m, rows in found["time"].items()} == {
        "dopsd": [5.0] * 4, "sft": [5.0] * 4,
    }  # fmt: skip
    assert {m: rows[0][0].seconds for m, rows in found["error"].items()} == {"dopsd": 20.0, "sft": 10.0}


def test_a_record_counts_only_for_what_decided_it(tmp_path: Path) -> None:
    trial = Trial(PLAN.methods[1], 3, 0, "error", 10, 0.1)
    path = tmp_path / "outcomes" / f"{trial.name}.json"
    path.parent.mkdir()
    done = outcome("sft", 3, 0, regime="error", digest=trial.digest("weights"))
    path.write_text(json.dumps(vars(done)))
    assert saved_outcome(trial, tmp_path, "weights") == done
    assert saved_outcome(trial, tmp_path, "weights", needs_images=True) is None
    others = [
        (trial, "other weights"),
        (replace(trial, steps=11), "weights"),
        (replace(trial, level=0.2), "weights"),
        (replace(trial, check_every=5), "weights"),
        (replace(trial, method=trial.method.at_rate(1e-3)), "weights"),
        (replace(trial, method=replace(trial.method, undistilled=True)), "weights"),
        (replace(trial, seed=1), "weights"),
    ]
    assert all(saved_outcome(other, tmp_path, fingerprint) is None for other, fingerprint in others)
    path.write_text(path.read_text()[:50])
    assert saved_outcome(trial, tmp_path, "weights") is None


def test_tables_have_means_and_paired_differences() -> None:
    """SFT is 0.2 worse in every pair, although the pairs differ by more among themselves."""
    errors = {(3, 0): 0.1, (3, 1): 0.5, (4, 0): 0.2, (4, 1): 0.6}
    found = {
        method: [[outcome(method, c, s, errors[c, s] + extra) for s in (0, 1)] for c in (3, 4)]
        for method, extra in (("untouched", 0.4), ("dopsd", 0.0), ("sft", 0.2))
    }
    means, differences = grids("methods", replace(PLAN, regimes=("steps",)), {"steps": found})
    assert means.columns == ("", "concept error", "named", "steps", "seconds")
    assert [row[0] for row in means.rows] == ["untouched", "D-OPSD", "SFT"]
    assert means.rows[1][1].startswith("0.35 [") and means.rows[1][3] == "10 [10, 10]"
    assert differences.rows == (("SFT", "**+0.2 [+0.2, +0.2]**", "0 [0, 0]", "0 [0, 0]", "0"),)
    assert "2 concepts and 2 seeds" in means.notes[0] and "SFT: 0.002" in means.notes[1]
    text = means.to_markdown()
    assert text.startswith("## Methods, equal steps\n\n|  | concept error |") and "| D-OPSD | 0.35 [" in text


def test_runs_that_did_not_reach_the_level_are_counted() -> None:
    found = {
        m: [[outcome(m, c, s, reached=m == "dopsd" or s == 0) for s in (0, 1)] for c in (3, 4)]
        for m in ("dopsd", "sft")
    }
    means, _ = grids("methods", replace(PLAN, regimes=("error",)), {"steps": found, "error": found})
    assert means.key == "compare-methods-error"
    assert "Reached by: SFT 2 of 4; by all other runs of the others." in means.notes[-1]


# -- the command -------------------------------------------------------------------------------------------------------


def compare_words(output: Path) -> list[str]:
    return [
        "compare", "--output", str(output),
        "--only", "dopsd", "--method", "db: objective=dreambooth, dreambooth_class_images=2", "--concepts", "1",
        "--seeds", "1", "--steps", "2", "--max-steps", "4", "--check-every", "2", "--level", "0.99",
    ]  # fmt: skip


def compare(output: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dopsd_core", *compare_words(output)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    with small_demo():
        assert main(compare_words(folder)) == 0
    return folder


def test_a_small_comparison_of_the_demo(output: Path) -> None:
    tables, result = load_grids(output)
    assert [table.key.removeprefix("compare-methods-") for table in tables] == [
        "steps", "steps-differences", "time", "time-differences", "error", "error-differences",
    ]  # fmt: skip
    assert [row[0] for row in tables[0].rows] == ["untouched", "its teacher", "D-OPSD", "db"]
    outcomes: Any = result["outcomes"]
    assert len(outcomes["steps"]) == 4 and len(outcomes["time"]) == len(outcomes["error"]) == 2
    by_name = {(o["method"], o["seed"]): o for o in outcomes["steps"]}
    assert by_name["teacher", 0]["scores"]["concept_error"] < by_name["untouched", 0]["scores"]["concept_error"]
    assert by_name["dopsd", 0]["steps"] == 2 and by_name["untouched", 0]["steps"] == 0
    assert by_name["db", 0]["drawing_seconds"] > 0 == by_name["dopsd", 0]["drawing_seconds"]
    stopped = [o for o in outcomes["error"] if o["method"] == "dopsd"]
    assert all(o["steps"] == 0 and o["reached"] for o in stopped)  # the level is above the untouched model's error
    sheet = Image.open(output / "comparison.png")
    assert sheet.height > 5 * 112 and sheet.width > 8 * 112
    assert not list(output.glob("concept-0/runs/*/checkpoints"))
    assert not list((output / "outcomes").glob("dopsd-time-*"))  # it is the same run as at equal steps


@pytest.mark.parametrize("undistilled", [pytest.param(False, marks=pytest.mark.long), True])
def test_the_error_in_training_is_that_of_the_distilled_model_with_the_weights(output: Path, undistilled: bool) -> None:
    """Weights of zero are the untouched model, whichever network they are attached to."""
    torch.set_num_threads(1)
    demo = Demo(load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE), make_concept(0), output / "concept-0")
    config = DOPSD.config(1, 0)
    other: Any = load_demo_model().denoiser
    with torch.no_grad():
        next(other.transformer.parameters()).mul_(0.0)
    adapters: Any = config.adapter.build(other if undistilled else demo.model.denoiser, FrozenTeacher(), 0)
    with adapters.attached():
        found = demo.concept_error(adapters, config, 9, 10, undistilled)
    chosen = torch.arange(0, 60, 6)
    images = demo.draw([demo.conditions.trigger[i] for i in chosen.tolist()], 9)
    right = judged_right(demo.judge, images, demo.concept.unseen.scenes[chosen].labels())
    expected = 1 - sum(right[name].float().mean().item() for name in APPEARANCE) / 4
    assert found == pytest.approx(expected) and 0 < found < 1


@pytest.mark.long
def test_it_is_resumed_and_only_what_changed_is_run_again(output: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (output / "outcomes").iterdir()}
    tables = (output / "comparison.md").read_bytes()
    (lost,) = (output / "outcomes").glob("db-steps-concept0-seed0.json")
    lost.unlink()
    done = compare(output)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in (output / "outcomes").iterdir()}
    found = [{path for path in paths if "-time-" not in path.name} for paths in (before, after)]  # these follow timings
    assert found[0] == found[1] and all(after[path] == before[path] for path in found[0] - {lost})
    assert (output / "comparison.md").read_bytes()[:200] == tables[:200]


def test_an_unfinished_run_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    """The steps in equal time follow the timings, and a run that was killed may have more of them already."""
    trial, run = Trial(DOPSD, 0, 0, "time", 58), tmp_path / "run"
    for config, kept in ((trial.config(), True), (replace(trial, steps=62).config(), False)):
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(config.to_json(), encoding="utf-8")
        make_room(trial, run)
        assert run.exists() == kept
    make_room(trial, run)  # there is none


def test_sections_of_the_results_page(output: Path) -> None:
    tables, _ = load_grids(output)
    made = sections("methods", tables, ["--preset", "methods"])
    assert made[0].command == "python -m benchmarks.compare --preset methods"
    assert "comparison_methods.png" in made[0].notes[-1] and made[1].table.columns == tables[1].columns
    others = sections("methods", tables, ["--preset", "methods", "--style", "--steps", "240"])
    assert not {s.key for s in others} & {s.key for s in made}, "they have their own place on the page"
    assert "Methods, styles 240 steps," in others[0].title
    assert "comparison_methods_styles_240_steps.png" in others[0].notes[-1]
    apart = sections("methods", tables, ["--preset", "methods", "--apart", "loss", "--output=there"])
    assert apart[0].key == made[0].key.replace("methods", "methods-loss") and "Methods, loss," in apart[0].title
    assert apart[0].command == "python -m benchmarks.compare --preset methods --apart loss"
    assert sections("methods", tables, ["--preset", "methods", "--apart=loss"])[0].key == apart[0].key
    own = ["--preset", "methods", "--method", "mine: lr=1e-3, rank=8"]
    assert shlex.split(sections("methods", tables, own)[0].command)[3:] == own, "the command can be pasted"


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*compare_words(tmp_path), "--method", "x: sft_shift=1"]) == 1
    error = capsys.readouterr().err
    assert "sft_shift is an option of objective sft" in error and "Traceback" not in error
