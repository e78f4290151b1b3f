"""The benchmark of learning per second: what counts as time, and what is read off the curves."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import learning_curves
from benchmarks.learning_curves import MARKS, SETTINGS, Clock, at_marks, best_rate, figures, seconds_to, sections

CURVE = [(float(second), 1 - second / 10, 0.5) for second in range(MARKS + 1)]


class FakeDemo:
    """Whose measurements take 100 seconds each, and whose gap follows the steps."""

    def __init__(self, now: list[float]) -> None:
        self._now = now

    def relative_gap(self, adapters: Any, seed: int) -> float:
        self._now[0] += 100
        return 1 / (1 + adapters)

    def concept_error(self, *_: Any) -> float:
        return 0.25


def test_measurements_are_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(learning_curves.time, "process_time", lambda: now[0])
    demo: Any = FakeDemo(now)
    clock = Clock(demo, SETTINGS[0].config(1e-3, 0), budget=16.0)
    clock.on_preview(0, 0)  # type: ignore[arg-type]
    step = 0
    while not clock.should_stop():
        step += 1
        now[0] += 1.0
        clock.on_preview(step, step)  # type: ignore[arg-type]
    assert (clock.seconds, clock.steps, len(clock.curve)) == (16.0, 16, MARKS + 1)
    assert [seconds for seconds, _, _ in clock.curve] == [2.0 * mark for mark in range(MARKS + 1)]
    clock.on_preview(17, 17)  # type: ignore[arg-type]
    assert len(clock.curve) == MARKS + 1  # the last call, after the end, adds nothing


def test_curves_are_read_off_straight_lines() -> None:
    assert at_marks(CURVE, 4.0, 1) == pytest.approx([1 - mark / 20 for mark in range(MARKS + 1)])
    assert at_marks(CURVE, 16.0, 1)[-1] == CURVE[-1][1]  # a run that ended before
    assert seconds_to(CURVE, 0.55) == pytest.approx(4.5)
    assert seconds_to(CURVE, 0.1) is None


def test_the_best_rate_leaves_the_smallest_gap_late() -> None:
    early = {"curve": [(s, 0.3 if s else 1.0, 0.0) for s in map(float, range(MARKS + 1))]}
    late = {"curve": [(s, 1 - s / 8, 0.0) for s in map(float, range(MARKS + 1))]}
    assert best_rate({1e-3: [early], 2e-3: [late]}, float(MARKS)) == 2e-3
    assert best_rate({1e-3: [early], 2e-3: [{"curve": CURVE}]}, float(MARKS)) == 1e-3
    assert best_rate({1e-3: [early, early], 2e-3: [late, {"curve": CURVE}]}, float(MARKS)) == 1e-3


def row(factor: float) -> dict[str, Any]:
    scores = {"concept_error": 0.1, "sharpness": 0.9, "frechet_prior": 150.0, "leak": 0.2}
    return {"curve": [(s, g * factor if s else 1.0, e) for s, g, e in CURVE], "steps": 9, "scores": scores}


def test_tables_compare_with_the_first_setting() -> None:
    rows = {"k4": [[row(1.0), row(1.0)]], "k4m1_gap": [[row(0.5), row(0.5)]]}
    means, differences = sections(rows, {"k4": 1e-3, "k4m1_gap": 2e-3}, float(MARKS), "command")
    assert [line[0] for line in means.table.rows] == ["K = 4", "m = 1 of K = 4, by gap"]
    place = means.table.columns.index("gap at 1/2")
    assert differences.table.rows[0][place] == "**-0.3 [-0.3, -0.3]**"
    assert "K = 4 2 of 2" not in means.notes[1]  # it ends at exactly that gap
    assert figures(row(1.0), 8.0)["seconds to gap 0.2"] == pytest.approx(8.0)


def test_every_setting_is_one_that_trains() -> None:
    configs = [setting.config(1e-3, 0) for setting in SETTINGS]
    assert len({config.to_json() for config in configs}) == len(SETTINGS)
    assert all(config.optimizer.lr == 1e-3 for config in configs)
