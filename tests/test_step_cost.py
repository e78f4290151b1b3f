"""The benchmark of learning: the authors' loop and ours have the same gradient, and the table says what ours saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step_cost
from benchmarks.journal import Journal
from benchmarks.step_cost import Bench, Setting, measure, run_all, section


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("pairs"), Setting("ours", 2, 1, 0))


def after_a_step(bench: Bench, variant: str) -> torch.Tensor:
    """The weights, which a step from the same start has changed."""
    bench.setting = replace(bench.setting, variant=variant)
    bench.begin()
    with bench.adapters.attached():
        bench.step(0)
        return torch.cat([parameter.detach().flatten() for parameter in bench.adapters.parameters()])


def test_the_authors_loop_and_ours_make_the_same_step(bench: Bench) -> None:
    authors, ours, one = (after_a_step(bench, variant) for variant in ("authors", "ours", "one"))
    assert torch.allclose(authors, ours, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, one, rtol=0, atol=1e-6)


@pytest.mark.long
def test_one_of_the_steps_costs_less_and_the_gap_begins_at_1(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "_counted_steps", lambda setting: 1 + 2 * (setting.variant == "one"))
    found: dict[str, Any] = {}
    for variant in ("authors", "ours", "one"):
        bench.setting = replace(bench.setting, variant=variant)
        bench.begin()
        found[variant] = measure(bench, most_steps=1)
        assert (found[variant]["steps"], found[variant]["reached"]) == (1, False)
    bench.begin()
    with bench.adapters.attached():
        assert bench.gap() == pytest.approx(1)
    flops = [found[variant]["flops"] for variant in ("authors", "ours", "one")]
    assert flops[0] > flops[1] > 1.4 * flops[2]
    assert found["ours"]["bytes"] < 0.8 * found["authors"]["bytes"]


def row(variant: str, seed: int, **changes: Any) -> dict[str, Any]:
    figures = {"bytes": 1e8, "flops": 2e9, "step_seconds": 0.5, "steps": 20, "seconds": 10.0, "reached": True}
    return {"setting": vars(Setting(variant, 4, 1, seed)), **figures, **changes}


def test_the_table_relates_means_to_the_authors_loop() -> None:
    rows = [row("authors", seed) for seed in (0, 1)]
    rows += [
        row("ours", 0, step_seconds=0.25, seconds=4.0),
        row("ours", 1, step_seconds=0.25, seconds=6.0, reached=False),
    ]
    made = section(rows, "python -m benchmarks.step_cost")
    assert made.table.rows == (
        ("4", "1", "authors' loop", "0.002", "2.00", "100", "2.0", "20", "10.0"),
        (
            "4",
            "1",
            "ours",
            "0.002",
            "4.00 (2.00)",
            "100 (1.00)",
            "2.0 (1.00)",
            "20 (1.00), 1 of 2 not reached",
            "5.0 (0.50)",
        ),
    )
    assert "2 seeds" in made.notes[0]


def test_all_are_compared_with_the_authors_loop_at_its_best_rate() -> None:
    rows = [
        {**row("authors", 0, seconds=seconds, reached=reached), "setting": vars(Setting("authors", 4, 1, 0, rate))}
        for rate, seconds, reached in ((1e-3, 12.0, True), (2e-3, 8.0, True), (4e-3, 5.0, False))
    ]
    made = section([*rows, row("one", 0, seconds=4.0)], "python -m benchmarks.step_cost")
    assert [(r[3], r[-1]) for r in made.table.rows] == [
        ("0.001", "12.0 (1.50)"), ("0.002", "8.0"), ("0.004", "5.0 (0.62)"), ("0.002", "4.0 (0.50)")
    ]  # fmt: skip


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, settings = Journal.open(tmp_path / "journal.jsonl"), [Setting("ours", 4, 1, seed) for seed in (0, 1)]
    journal.append(row("ours", 0))
    asked: list[str] = []

    def answer(command: list[str], **_: Any) -> Any:
        asked.append(command[command.index("--worker") + 1])
        return type("Done", (), {"returncode": 0, "stdout": 'noise\n{"steps": 3}\n'})

    monkeypatch.setattr(step_cost.subprocess, "run", answer)
    found = run_all(settings, journal)
    assert [r["steps"] for r in found] == [20, 3] and len(asked) == 1 and '"seed": 1' in asked[0]
    assert [r["steps"] for r in Journal.open(tmp_path / "journal.jsonl").rows] == [20, 3]
