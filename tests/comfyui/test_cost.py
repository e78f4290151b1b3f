"""The benchmarks at real width, dry: what they count is what the cost model and the memory plan say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from inprocess import CHECKOUT, ROOT

FEW_BLOCKS = {
    "zimage_cost": ("--layers", "1"),
    "klein_cost": ("--double", "1", "--single", "2"),
    "krea2_cost": ("--blocks", "3"),
}


@pytest.mark.parametrize("name", FEW_BLOCKS)
def test_counted_at_the_real_width(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs by torch's counter within 5 %; peaks at most as planned, whose margin is larger for so few blocks."""
    monkeypatch.setenv("COMFYUI_PATH", str(CHECKOUT))
    options = ["--device", "meta", "--resolutions", "512", "--rollout-steps", "2", "--no-baseline", *FEW_BLOCKS[name]]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["none", "selective", "all", "24 GB", "16 GB", "12 GB", "8 GB"]
    for row in rows.values():
        assert row["seconds"] is None and row["counted"] in (None, pytest.approx(1, abs=0.05))
        assert row["planned_gb"] is None or 0.7 * row["planned_gb"] < row["peak_gb"] <= row["planned_gb"]
    none, selective, full = (rows[name] for name in ("none", "selective", "all"))
    assert none["peak_gb"] > selective["peak_gb"] > full["peak_gb"]
    assert none["tflop"] < selective["tflop"] < 1.02 * none["tflop"] < full["tflop"]
