"""The log holds exactly the steps of the run, whatever cut it."""

import json
import math
from pathlib import Path

import pytest

from dopsd_core.files.disk import DiskError
from dopsd_core.training.log import Gaps, RunLog, StepReport, curve, mean_metrics, read_log


def write(path: Path, steps: range) -> None:
    log = RunLog(path, -1)
    for step in steps:
        log.append(StepReport(step=step, loss=step / 3, relative_gap=1 / (step + 1) if step % 2 == 0 else None))
    log.close()


def steps_of(path: Path) -> list[int]:
    return [report.step for report in read_log(path)]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(8))
    before = read_log(path)
    log = RunLog(path, 5)
    log.append(StepReport(step=6, loss=9.0))
    log.sync()
    log.close()
    assert steps_of(path) == list(range(7)) and read_log(path)[:6] == before[:6] and read_log(path)[6].loss == 9


def test_a_torn_line_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(4))
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[:-cut])
        expected = read_log(path)
        assert [report.step for report in expected] == list(range(len(expected))) and len(expected) in (2, 3, 4)
        RunLog(path, 3).close()
        assert read_log(path) == expected and path.read_bytes() in (whole[: path.stat().st_size], whole)


@pytest.mark.parametrize(
    "junk",
    [
        "[1]\n", '"x"\n', '{"step": "a"}\n', '{"step": 1}\n', '{"loss": 1}\n', "\x00\n", "[" * 100_000 + "\n",
        '{"step": 3, "loss": "x"}\n', '{"step": 3, "gap": []}\n',
    ],
    ids=lambda junk: junk[:20].strip(),
)  # fmt: skip
def test_junk_ends_the_log(tmp_path: Path, junk: str) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(3))
    path.write_text(path.read_text() + junk + StepReport(step=9).to_row())
    assert steps_of(path) == [0, 1, 2]


def test_a_new_run_empties_the_log_and_newer_fields_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(3))
    RunLog(path, -1).close()
    assert path.read_bytes() == b"" and read_log(tmp_path / "gone") == []
    path.write_text('{"step": 1, "loss": 2.0, "invented_later": "x", "flag": true}\n')
    assert read_log(path) == [StepReport(step=1, loss=2.0)]


def test_an_objectives_metrics_stand_in_the_row_under_their_own_names(tmp_path: Path) -> None:
    report = StepReport(step=1, loss=2.0, metrics={"margin": 0.25, "accept": 1.0}, lr=1e-4)
    assert json.loads(report.to_row()) == {
        "step": 1,
        "loss": 2.0,
        "margin": 0.25,
        "accept": 1,
        "lr": 1e-4,
        "anchors": 0,
    }
    log = RunLog(tmp_path / "log.jsonl", -1)
    log.append(report)
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [report]
    with pytest.raises(ValueError, match="metric may not be named lr"):
        StepReport(step=1, metrics={"lr": 1.0})


def test_rows_of_release_0_2_are_read() -> None:
    first, second, *_ = read_log(Path(__file__).parent / "legacy" / "tiny_run" / "train.jsonl")
    assert first.metrics.keys() == {"gap"} and first.relative_gap == 1 and first.loss is None
    assert second.metrics.keys() == {"gap", "cosine", "norm_ratio"} and second.loss is not None


def test_metrics_are_averaged_over_the_batches_that_have_them() -> None:
    assert mean_metrics([{"a": 1.0, "b": 5.0}, {"a": 2.0}]) == {"a": 1.5, "b": 5.0}
    assert mean_metrics([]) == {}


def test_curves_hold_what_was_measured(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", range(5))
    reports = read_log(tmp_path / "log.jsonl")
    assert curve(reports, lambda report: report.relative_gap) == ([0, 2, 4], [1, 1 / 3, 1 / 5])
    assert "nan" not in StepReport(step=1, loss=math.nan, metrics={"gap": math.inf}).to_row().lower()


def test_gaps_are_relative_to_the_start() -> None:
    assert Gaps(0.5, 3.0).relative_to(Gaps(2.0, 4.0)) == (0.25, 0.75)
    assert Gaps(0.5, None).relative_to(Gaps(0.0, None)) == (None, None)


def test_a_log_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.mkdir()
    with pytest.raises(DiskError, match=r"train.jsonl could not be written: .*; check the disk and the folder"):
        RunLog(path, 3)
