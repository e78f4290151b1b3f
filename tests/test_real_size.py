"""benchmarks/real_size.py: single rows by name. What the rows say: tests/comfyui/test_cost.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import networks, real_size
from benchmarks.real_size import Session
from benchmarks.real_step import Bench
from benchmarks.zimage_cost import subject


@pytest.fixture(autouse=True)
def without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is run: it takes a minute even at this size, with all that is counted in it."""
    monkeypatch.setattr(real_size, "matmul_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(Bench, "measure", lambda self, row, *args, **kwargs: row)


def measured(*options: str) -> Session:
    small = ["--device", "cpu", "--host", "diffusers", "--resolutions", "64", "--rollout-steps", "2", "--steps", "1"]
    args = real_size.parser(None).parse_args([*small, "--encoder-layers", "1", "--rank", "2", *options])
    return real_size.run(subject(layers=1, heads=1), args)


@pytest.mark.parametrize("only", [["selective"], ["all", "none"]])
def test_only_the_rows_that_are_named(only: list[str]) -> None:
    rows = measured("--only", *only).rows
    assert {row.variant for row in rows} == {*only} and len(rows) == len(only)


def test_no_encoders_are_made_for_rows_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(real_size, "AuthorsEncoders", lambda *args: made.append(args))
    measured("--only", "all")
    assert not made


def test_a_name_that_no_row_has_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "diffusers", lambda *args: pytest.fail("made a network"))
    with pytest.raises(SystemExit, match=r"no rows named '17 GB'; there are none, selective, .*16 GB"):
        measured("--only", "selective", "17 GB")


def test_a_row_that_this_machine_does_not_have_is_said(tmp_path: Path) -> None:
    """And what was measured is written."""
    with pytest.raises(SystemExit, match="not measured: '16 GB'; memory presets need ComfyUI"):
        measured("--only", "none", "16 GB", "--json", str(tmp_path / "rows.json"))
    assert '"none"' in (tmp_path / "rows.json").read_text()
