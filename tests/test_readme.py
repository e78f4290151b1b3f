"""What the README says is so: its length, its links, its Python, its figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_people_finish_it() -> None:
    assert len(README.split()) <= 900


def test_its_files_are_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_python_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    short = code.replace("steps=60", "steps=2")
    assert short != code
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.splitlines()[-1]).is_file()


def test_its_figures_are_those_of_the_results() -> None:
    results = ROOT / "docs" / "results.json"
    if not results.exists():
        pytest.fail("docs/results.json is missing: run python -m benchmarks.demo")
    table = json.loads(results.read_text(encoding="utf-8"))["demo"]["table"]
    columns, rows = table["columns"], {row[0]: row for row in table["rows"]}
    block = README.partition("<!-- results:demo -->")[2].partition("<!-- /results -->")[0]
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
    assert len(lines) == 7  # titles, rule, five methods
    for method, *figures in lines[2:]:
        wanted = [rows[method][columns.index(title)].partition(" ±")[0] for title in lines[0][1:]]
        assert figures == wanted, method
