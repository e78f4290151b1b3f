"""The commands, run as a user runs them, on the shipped model: short, but every file and figure is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from dopsd_core.__main__ import main

from .small_demo import small_demo

ROOT = Path(__file__).parent.parent


def words(*args: object) -> list[str]:
    return [*map(str, args)]


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dopsd_core", *words(*args)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with small_demo():
        assert main(words("demo", "--concept-seed", 4, "--steps", 12, "--seeds", 1, "--output", folder)) == 0
    return folder


def test_demo_leaves_a_report_with_every_figure(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    assert report["peak_rss_mb"] > 100
    assert_complete(report)


@pytest.mark.long
def test_the_whole_demo_in_its_processes(tmp_path: Path) -> None:
    done = command("demo", "--concept-seed", 4, "--steps", 12, "--seeds", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "D-OPSD closed" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert_complete(report)
    assert len(report["sft"]["tried"]) >= 2 and 100 < report["peak_rss_mb"] < 3000


def assert_complete(report: dict[str, Any]) -> None:
    assert set(report["methods"]) == {"base", "teacher", "dopsd", "sft", "dreambooth"}
    for figures in report["methods"].values():
        for name in ("concept_error", "prompt_following", "sharpness", "frechet_trigger", "frechet_prior"):
            assert set(figures[name]) == {"mean"}  # of one run
    methods = report["methods"]
    assert methods["teacher"]["concept_error"]["mean"] < 0.1 < 0.3 < methods["base"]["concept_error"]["mean"]
    assert methods["dopsd"]["concept_error"]["mean"] < methods["base"]["concept_error"]["mean"] - 0.05
    assert report["config"]["steps"] == 12
    assert report["wall_seconds"] > 0


def test_demo_leaves_images_and_a_lora(output: Path) -> None:
    for name in ("overview.png", "contact_sheet.png", "curves.png"):
        with Image.open(output / name) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 100
    with safe_open(output / "lora.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["dopsd_objective"] == "dopsd"
    assert "transformer.layers.0.attention.to_q.lora_A.weight" in names
    assert sorted(path.suffix for path in (output / "dataset").iterdir()) == [".png"] * 4 + [".txt"] * 4


@pytest.mark.long
def test_train_then_sample_on_the_demos_data(output: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ("train", output / "dataset", "--output", run, "--steps", 12, "--batch-size", 2, "--anchor-probability", 0.5)
    done = command(*args, "--heldout-caption", "a [V] badge, middle, on a sky background")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12 and rows[0]["heldout_relative_gap"] == 1 and sum(row["anchors"] for row in rows) > 0
    prompt = "a [V] badge, left, on a sky background"
    images = {}
    for name, extra in {"base": (), "lora": ("--lora", run / "lora.safetensors")}.items():
        words = ("sample", prompt, "--output", tmp_path / name, "--seed", 5, *extra)
        assert main([*map(str, words)]) == 0
        images[name] = (tmp_path / name / "01_seed5.png").read_bytes()
    assert images["base"] != images["lora"]


def test_train_on_a_bad_dataset_lists_everything_and_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "a.txt").write_text("a dog")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "run")]) == 1
    text = "".join(capsys.readouterr())
    assert "a.png" in text and "b.png" in text
    assert "Traceback" not in text and not (tmp_path / "run").exists()
