"""benchmarks/demo_concepts.py: median and worst over the concepts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_concepts, report
from benchmarks.demo_concepts import section
from dopsd_core.standalone.compare import METHODS
from dopsd_core.standalone.evaluate import TITLES


def reports(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One per concept; figures that are not given are 0."""
    count = len(next(iter(values.values())))
    return [
        {
            "gap_closed": 0.9 + 0.01 * i, "wall_seconds": 60.0 + i, "peak_rss_mb": 2000.0,
            "methods": {m: {n: {"mean": values.get(n, [0.0] * count)[i]} for n in TITLES} for m in METHODS},
        }
        for i in range(count)
    ]  # fmt: skip


def test_the_worst_is_the_largest_but_where_more_is_better() -> None:
    values = {"concept_error": [0.01, 0.03, 0.02], "sharpness": [0.8, 0.7, 0.9], "frechet_prior": [90.4, 300.6, 120.2]}
    made = section(reports(values), 1, 2)
    (row,) = {cells[1:] for cells in made.table.rows}
    found = dict(zip(TITLES, row, strict=True))
    assert found["concept_error"] == "0.02 (0.03)"
    assert found["sharpness"] == "0.8 (0.7)"
    assert found["frechet_prior"] == "120 (301)"
    assert [cells[0] for cells in made.table.rows] == list(METHODS.values())
    assert "91% of the gap" in made.notes[0] and "on the worst concept 90%" in made.notes[0]


def test_what_another_demo_model_did_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    really = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "demo" not in command:  # git's
            return really(command, **options)
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(reports({"leak": [0.5]})[0]))
        ran.append(folder.name)
        return None

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo_concepts, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("sys.argv", ["x", "--output", str(tmp_path), "--seeds", "1"])
    demo_concepts.main()
    demo_concepts.main()
    assert ran == ["concept-0"]
    monkeypatch.setattr(report, "demo_model_digest", lambda: "another")
    demo_concepts.main()
    assert ran == ["concept-0", "concept-0"]
