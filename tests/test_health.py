"""A run watches itself: what is said of which series of step reports, and nothing of a run as it should be."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_core.config import TrainConfig, changes_that_forbid_resuming
from dopsd_core.memory.in_use import memory_in_use
from dopsd_core.training.health import Monitor, burning, growing_memory, overfitting, plateau_line, slow_down
from dopsd_core.training.log import LOG_NAME, StepReport, read_log
from dopsd_core.training.run import Run
from dopsd_core.training.run_folder import RunFolder
from dopsd_core.training.trainer import NoCallbacks, TrainResult, train
from dopsd_core.training.unseen_gap import BestStep, is_plateau, overfitting_since
from tests.tiny import TinyDenoiser, make_config, make_data, make_pair


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def series(**values: Iterable[Any]) -> list[StepReport]:
    """Reports of the steps from 1 on with these values; None for one that is not measured."""
    rows = zip(*values.values(), strict=True)
    return [StepReport(step=step, **dict(zip(values, row, strict=True))) for step, row in enumerate(rows, 1)]


def gaps(unseen: Sequence[float], trained: Sequence[float] | None = None) -> list[StepReport]:
    """A measurement every 10 steps."""
    trained = trained or [0.5] * len(unseen)
    return [
        StepReport(step=10 * number, heldout_relative_gap=gap, relative_gap=other)
        for number, (gap, other) in enumerate(zip(unseen, trained, strict=True), 1)
    ]


# -- pace --------------------------------------------------------------------------------------------------------------


def test_steps_that_take_longer_than_in_the_first_minutes_are_named() -> None:
    usual = [2.0] * 100
    assert slow_down(series(seconds=[9.0, 9.0, *usual, *[3.2] * 20])) is not None
    line = slow_down(series(seconds=[9.0, 9.0, *usual, *[3.2] * 20]))
    assert line is not None and line.startswith("slow-down: a step takes 3.2 s, in the first minutes it took 2 s;")


@pytest.mark.parametrize(
    "seconds",
    [
        [2.0] * 300,
        [9.0, 9.0, *[2.0] * 98],
        [2.0] * 100 + [2.9] * 100,  # not by half
        [2.0] * 100 + [60.0] * 9 + [2.0] * 11,  # some slow ones among the last
        [2.0] * 100 + [9.0] * 5,  # not yet a window
        [0.1] * 300 + [9.0] * 20 + [0.1] * 20,  # slow for a while, and no longer
        [0.01] * 200 + [0.05] * 40,  # over before the first minutes are
    ],
)
def test_a_usual_pace_is_not_mentioned(seconds: list[float]) -> None:
    assert slow_down(series(seconds=seconds)) is None


def test_slow_first_steps_are_no_measure() -> None:
    """Their memory is allocated, their kernels are chosen: with them, the pace of the rest would seem slow or fast."""
    assert slow_down(series(seconds=[500.0, 500.0, *[2.0] * 95, *[4.0] * 20])) is not None


# -- burn --------------------------------------------------------------------------------------------------------------


def ratios(values: Iterable[float], anchors: int = 0) -> list[StepReport]:
    return [StepReport(step=n, metrics={"norm_ratio": v}, anchors=anchors) for n, v in enumerate(values, 1)]


def test_velocities_that_are_too_large_are_named() -> None:
    line = burning(ratios([1.0] * 50 + [1.08] * 20))
    assert line is not None and "burn: the student's velocities are 1.08 times as large" in line


@pytest.mark.parametrize("values", [[0.85] * 50, [1.2] * 19, [1.0, 1.09] * 30, [1.3] * 20 + [1.0] * 20, []])
def test_velocities_as_they_should_be_are_not(values: list[float]) -> None:
    assert burning(ratios(values)) is None


def test_anchors_and_objectives_without_the_ratio_do_not_count() -> None:
    assert burning(ratios([1.2] * 60, anchors=1)) is None
    assert burning(ratios([1.2] * 60, anchors=1), batches=2) is not None
    assert burning(series(loss=[1.0] * 60)) is None


# -- overfitting -------------------------------------------------------------------------------------------------------


RISING, FALLING = [0.8, 0.5, 0.6, 0.62, 0.65], [0.7, 0.4, 0.3, 0.2, 0.1]


def test_the_unseen_gap_rises_while_the_trained_one_falls() -> None:
    line = overfitting(gaps(RISING, FALLING), BestStep(20, 0.5, Path("runs/dog/loras/step-000020.safetensors")))
    assert line == (
        "overfitting: since step 20 the gap on the unseen prompt rises (0.500, now 0.650) while that on the training "
        "images falls; the best LoRA that is kept is loras/step-000020.safetensors"
    )
    for best in (None, BestStep(20, 0.5)):
        line = overfitting(gaps(RISING, FALLING), best)
        assert line is not None and line.endswith("falls; set save_every to keep LoRA files along the way")


@pytest.mark.parametrize(
    ("unseen", "trained"),
    [
        (RISING[:4], FALLING[:4]),  # twice only
        ([0.8, 0.5, 0.6, 0.52, 0.65], FALLING),  # not in a row
        (RISING, [0.7, 0.4, 0.3, 0.45, 0.1]),  # the trained one rises too: something else is wrong
        ([0.8, 0.7, 0.6, 0.5, 0.4], FALLING),
        ([0.8, 0.5, 0.51, 0.52, 0.52], FALLING),  # within 5 %
        ([], []),
    ],
)
def test_what_is_no_overfitting(unseen: list[float], trained: list[float]) -> None:
    assert overfitting_since(gaps(unseen, trained)) is None


def test_the_smallest_gap_counts_however_long_ago_it_was() -> None:
    assert overfitting_since(gaps([0.5, *[0.6] * 9], [0.4, *[0.3] * 9])) == 10
    assert overfitting_since(gaps([0.1, *RISING], [0.1, *FALLING]), after=10) == 30


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu_gb", "ram_gb"])
def test_memory_that_keeps_growing_is_named(name: str) -> None:
    line = growing_memory(series(**{name: [10 + 0.02 * step for step in range(200)]}))
    assert line is not None and ("GPU memory" in line) == (name == "gpu_gb")
    assert "was 10.6 GB at first and is 13.8 GB" in line


@pytest.mark.parametrize(
    "values",
    [
        [10.0] * 200,
        [5.0] * 15 + [10.0] * 185,  # allocated at the start
        [10.0 + min(step, 60) * 0.1 for step in range(200)],  # a cache that fills, and is full
        [1.0 + 0.002 * step for step in range(200)],  # less than half a GB
        [100.0 + 0.02 * step for step in range(200)],  # less than a tenth
        [10.0 + 0.1 * step for step in range(60)],  # too short
        [None] * 200,
    ],
)
def test_memory_as_it_should_be_is_not(values: list[float | None]) -> None:
    assert growing_memory(series(ram_gb=values)) is None


def test_memory_is_measured() -> None:
    import psutil

    measured = memory_in_use(torch.device("cpu"))
    assert measured.gpu_gb is None and measured.ram_gb == pytest.approx(
        psutil.Process().memory_info().rss / 1e9, rel=0.2
    )


# -- each once ---------------------------------------------------------------------------------------------------------


def test_each_is_said_once() -> None:
    monitor, lines = Monitor(make_config(), []), list[str]()
    for step in range(1, 301):
        late = step > 150
        monitor.add(
            StepReport(
                step=step, seconds=4.0 if late else 2.0, metrics={"norm_ratio": 1.2 if late else 0.9},
                ram_gb=10 + 0.02 * step, heldout_relative_gap=(0.9 if late else 0.5) if step % 10 == 0 else None,
                relative_gap=(0.2 if late else 0.4) if step % 10 == 0 else None,
            )
        )  # fmt: skip
        lines += monitor.new_lines(None)
    assert sorted(line.split(":")[0] for line in lines) == ["burn", "memory grows", "overfitting", "slow-down"]


def test_pace_and_memory_are_those_of_this_process() -> None:
    """A run that is resumed on another machine starts anew; its gaps do not."""
    earlier = series(
        seconds=[1.0] * 300, ram_gb=[1.0] * 300, heldout_relative_gap=[*[0.4] * 299, 0.5], relative_gap=[0.3] * 300
    )
    monitor = Monitor(make_config(), earlier)
    lines = list[str]()
    for step in range(301, 400):
        monitor.add(StepReport(step=step, seconds=9.0, ram_gb=5.0, heldout_relative_gap=0.5, relative_gap=0.1))
        lines += monitor.new_lines(None)
    assert [line.split(":")[0] for line in lines] == ["overfitting"]


# -- in a run ----------------------------------------------------------------------------------------------------------


def run_with(monkeypatch: pytest.MonkeyPatch, folder: Path, unseen: Sequence[float], **options: Any) -> TrainResult:
    """A run whose gaps on the unseen prompt are these, every second step."""
    step, append = Run.make_step, RunFolder.append

    def faked(report: StepReport) -> StepReport:
        if not report.step or report.heldout_relative_gap is None:
            return report
        gap = unseen[min(report.step // 2, len(unseen)) - 1]
        return dataclasses.replace(report, heldout_relative_gap=gap, relative_gap=0.5 / report.step)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "make_step", lambda run: faked(step(run)))
        patched.setattr(RunFolder, "append", lambda folder, report: append(folder, faked(report)))
        data = make_data(3, heldout=make_pair(99))
        return train(make_config(probe_every=2, **options), TinyDenoiser(), data, folder, NoCallbacks())


def test_a_run_warns_with_the_best_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dopsd"):
        result = run_with(monkeypatch, tmp_path, [0.8, 0.4, 0.5, 0.6, 0.7, 0.8], save_every=4, keep_loras=1)
    assert result.best == BestStep(4, 0.4, tmp_path / "loras" / "step-000004.safetensors")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("overfitting: since step 4 ") and line.endswith("is kept is loras/step-000004.safetensors")


def test_a_run_as_it_should_be_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dopsd"):
        train(make_config(), TinyDenoiser(), make_data(heldout=make_pair(99)), tmp_path)
    assert caplog.records == []
    assert all(report.ram_gb for report in read_log(tmp_path / LOG_NAME)[1:])


# -- early stop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unseen", "patience", "ends"),
    [
        ([0.5, 0.5, 0.5], 2, True),
        ([0.5, 0.5, 0.5], 3, False),
        ([0.5, 0.497, 0.496], 2, True),  # not by 1 %
        ([0.5, 0.48, 0.46, 0.44], 1, False),
        ([0.5, 0.6, 0.4, 0.5], 2, False),
        ([1.2, 1.1], 2, True),  # never better than before training
        ([0.5] * 50, 0, False),
        ([], 1, False),
    ],
)
def test_a_plateau_is_so_many_measurements_without_a_smaller_gap(
    unseen: list[float], patience: int, ends: bool
) -> None:
    assert is_plateau(gaps(unseen), patience) is ends


def test_the_line_says_the_smallest_gap_and_what_to_do() -> None:
    config = TrainConfig(stop_at_plateau=2, steps=500)
    assert plateau_line(gaps([0.5, 0.6, 0.7]), config) == (
        "stopped at step 30 of 500: each of the last 2 measurements has lowered the gap on the unseen prompt by less "
        "than 1 %; the smallest is 0.500 at step 10; to continue this run, raise stop_at_plateau or set it to 0"
    )


def test_a_run_that_never_helped_says_so() -> None:
    line = plateau_line(gaps([1.2, 1.1]), TrainConfig(stop_at_plateau=1, steps=500))
    assert line is not None and "the last measurement has lowered" in line
    assert "no step is better than the untouched model, whose gap is 1: lower lr, and train again; to cont" in line
    rising = overfitting(gaps([1.2, 1.3, 1.4, 1.5], [0.9, 0.8, 0.7, 0.6]), BestStep(10, 1.2, Path("loras/a")))
    assert rising is not None and rising.endswith("lower lr, and train again") and "best LoRA" not in rising


def test_measurements_in_the_warm_up_do_not_count() -> None:
    unseen = gaps([1.0, 1.0, 0.999, 0.99, 0.99])  # at steps 10 to 50
    assert is_plateau(unseen, 3) and is_plateau(unseen, 2, warmup=30) and not is_plateau(unseen, 3, warmup=30)
    config = TrainConfig.from_json('{"schedule": {"name": "constant", "warmup": 30}, "stop_at_plateau": 3}')
    assert plateau_line(unseen, config) is None


def test_where_nothing_is_measured_there_is_no_plateau() -> None:
    assert plateau_line([], TrainConfig(stop_at_plateau=1)) is None


def test_a_run_stops_at_a_plateau_and_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unseen = [0.8, 0.4, 0.5, 0.6, 0.3]
    result = run_with(monkeypatch, tmp_path, unseen, stop_at_plateau=2, save_every=100)
    assert (result.step, result.stopped, result.at_plateau) == (8, False, True)
    assert result.checkpoint_path.name == "step-000008" and result.lora_path.exists()
    assert [path.name for path in (tmp_path / "loras").iterdir()] == ["step-000008.safetensors"]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(":")[0] for line in lines] == ["stopped at step 8 of 12"]
    again = run_with(monkeypatch, tmp_path, unseen, stop_at_plateau=2)
    assert (again.step, again.at_plateau) == (8, True)
    more = run_with(monkeypatch, tmp_path, unseen, stop_at_plateau=0)
    assert (more.step, more.stopped, more.at_plateau) == (12, False, False)


def test_it_is_no_other_run_and_off_unless_asked_for() -> None:
    assert TrainConfig().stop_at_plateau == 0
    assert changes_that_forbid_resuming(make_config(), make_config(stop_at_plateau=3)) == ()
    assert make_config().identity() == make_config(stop_at_plateau=3).identity()


@pytest.mark.parametrize(
    ("options", "heldout", "why"),
    [({}, False, "there is no unseen prompt"), ({"probe_every": 0}, True, "probe_every is 0")],
)
def test_where_nothing_is_measured_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, int], heldout: bool, why: str
) -> None:
    data = make_data(heldout=make_pair(99) if heldout else None)
    train(make_config(stop_at_plateau=1, **options), TinyDenoiser(), data, tmp_path)
    assert f"stop_at_plateau 1 is not used: {why}" in [record.getMessage() for record in caplog.records]
