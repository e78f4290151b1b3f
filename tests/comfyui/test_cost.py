"""The benchmarks at real width, dry: what they count is what the cost model and the memory plan say."""

from __future__ import annotations

import json
import os
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


SCRIPT = """
import json, runpy, sys
for name, options in json.loads(sys.argv[1]).items():
    sys.argv = [name, *options]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<benchmark>.json of each, counted in one process: ComfyUI is imported once."""
    folder = tmp_path_factory.mktemp("counted")
    common = ["--device", "meta", "--resolutions", "512", "--rollout-steps", "2", "--no-baseline"]
    options = {name: [*common, *few, "--json", str(folder / f"{name}.json")] for name, few in FEW_BLOCKS.items()}
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    environment = {**os.environ, "COMFYUI_PATH": str(CHECKOUT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", FEW_BLOCKS)
def test_counted_at_the_real_width(name: str, counted: Path) -> None:
    """FLOPs by torch's counter within 5 %; peaks at most as planned, whose margin is larger for so few blocks."""
    rows = {row["variant"]: row for row in json.loads((counted / f"{name}.json").read_text())}
    usual = [variant for variant in rows if "offload" not in variant]
    assert usual == ["none", "selective", "all", "24 GB", "16 GB", "12 GB", "8 GB"]
    assert {*rows} - {*usual} == {"offloaded", "8 GB, offloading"}  # at 512 the others have room for all
    for row in rows.values():
        assert row["seconds"] is None and row["counted"] in (None, pytest.approx(1, abs=0.05))
        assert row["planned_gb"] is None or 0.7 * row["planned_gb"] < row["peak_gb"] <= row["planned_gb"]
    none, selective, full = (rows[name] for name in ("none", "selective", "all"))
    assert none["peak_gb"] > selective["peak_gb"] > max(full["peak_gb"], rows["offloaded"]["peak_gb"])
    assert none["tflop"] < selective["tflop"] < 1.02 * none["tflop"] < full["tflop"]
