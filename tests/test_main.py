"""The command line offers its pieces, finds mistakes, and covers every setting."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dopsd_core import arguments
from dopsd_core.__main__ import main
from dopsd_core.adapters import Lora
from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.demo.settings import demo_config
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import AdamW
from dopsd_core.options import all_options
from dopsd_core.teachers import FrozenTeacher

LORA = Lora(rank=8, alpha=16.0, targets=("to_q",))
DEFAULTS = TrainConfig(steps=50, adapter=LORA)


def config_of(*words: str) -> TrainConfig:
    args = arguments.parse_args(["train", "photos", "--output", "run", *words])
    return arguments.config_from_args(args, DEFAULTS)


def run_quickly(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; import dopsd_core.__main__ as m; sys.exit(m.main(sys.argv[1:]))"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)


def test_help_needs_no_torch_and_names_every_command() -> None:
    result = run_quickly("--help")
    assert result.returncode == 0, result.stderr
    assert all(re.search(rf"\n    {command}\s", result.stdout) for command in arguments.COMMANDS)


def test_help_of_train_has_everything_that_is_declared() -> None:
    result = run_quickly("train", "--help")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split()).replace("- ", "-")
    for option in all_options(TrainConfig, demo_config()):
        if option.hint.from_host:
            continue
        assert f"--{option.name.replace('_', '-')} " in words
        assert f"{option.help} ({option.facts()})".replace("- ", "-") in words, option.name
        assert not option.choices or "{" + ",".join(option.choices) + "}" in words
    for heading in ("run:", "objective:", "with --objective dopsd:", "with --optimizer prodigy:"):
        assert f"\n{heading}\n" in result.stdout


def test_mistakes_in_options_are_reported_before_torch_is_needed(tmp_path: Path) -> None:
    words = ("train", str(tmp_path), "--output", str(tmp_path / "run"))
    result = run_quickly(*words, "--stpes", "3")
    assert result.returncode == 2 and "did you mean --steps instead of --stpes?" in result.stderr
    result = run_quickly(*words, "--steps", "x", "--lr", "9", "--sft-sigmas", "grid", "--teacher", "me")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: 4 problems in the configuration:",
        "- steps is 'x', it must be a whole number",
        "- lr is 9.0; set it above 0 and at most 0.1",
        "- teacher is 'me'; choose one of ema, frozen, same",
        "- sft_sigmas is an option of objective sft, and objective is dopsd; leave it out, or set objective to sft",
    ]


@pytest.mark.parametrize("command", arguments.COMMANDS)
def test_every_argument_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and len(capsys.readouterr().out) > 500
    for action in arguments._commands(arguments.make_parser())[command]._actions:
        assert action.help, action.dest


def test_options_over_defaults_and_over_a_file(tmp_path: Path) -> None:
    assert config_of() == DEFAULTS
    config = config_of("--lr", "0.002", "--rank", "4", "--teacher", "frozen")
    assert config == DEFAULTS.replace(
        optimizer=AdamW(lr=0.002), adapter=LORA.replace(rank=4, alpha=8.0), teacher=FrozenTeacher()
    )
    (tmp_path / "config.json").write_text(config.to_json())
    words = ("--config", str(tmp_path / "config.json"), "--alpha", "1", "--targets", "a", "b", "--grad-steps", "2")
    other = config_of(*words)
    adapter = Lora(rank=4, alpha=1.0, targets=("a", "b"))
    assert other == config.replace(objective=DOPSD(grad_steps=2), adapter=adapter)
    (tmp_path / "config.json").write_text(other.to_json())
    assert config_of("--config", str(tmp_path / "config.json"), "--grad-steps", "none").objective == DOPSD()
    with pytest.raises(ConfigError, match="rank is 9999; set it to a value from 1 to 1024"):
        config_of("--rank", "9999")


def test_inspecting_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "a.png")
    words = ["inspect-dataset", str(tmp_path), "--resolution", "64"]
    assert main(words) == 1
    assert f"error: {tmp_path / 'a.png'}: no caption" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("a [V] dog")
    assert main([*words, "--trigger", "sks"]) == 0
    assert "1 in bucket 64x64" in capsys.readouterr().out


def test_edits_are_not_for_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, shade in (("source", 1), ("target", 200)):
        (tmp_path / "edits" / place).mkdir(parents=True)
        Image.new("RGB", (64, 64), (shade, 2, 3)).save(tmp_path / "edits" / place / "a.png")
    (tmp_path / "edits" / "target" / "a.txt").write_text("make it red")
    assert main(["train", str(tmp_path / "edits"), "--output", str(tmp_path / "run")]) == 1
    assert "contains edits, but the demo model cannot edit" in capsys.readouterr().err


def test_mistakes_are_reported_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-dataset", str(tmp_path), "--resolution", "3"]) == 1
    assert "error: no image with sides" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "a.png"}))
    assert main(["inspect-dataset", str(tmp_path / "a.jsonl")]) == 1


def test_digits_that_are_joined_by_underscores_are_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    """Python reads 1_0 as 10."""
    with pytest.raises(ConfigError, match="steps is '1_0', it must be a whole number"):
        config_of("--steps", "1_0")
    with pytest.raises(ConfigError, match="lr is '1_0e-5', it must be a number"):
        config_of("--lr", "1_0e-5")
    for words, reported in (
        (["train", "photos", "--output", "run", "--repeats", "1_0"], "--repeats: '1_0' is not a whole number"),
        (["sample", "a badge", "--strength", "0.5_"], "--strength: '0.5_' is not a number"),
        (["sample", "a badge", "--size", "64", "6_4"], "--size: '6_4' is not a whole number"),
        (["evaluate", "photos", "--seeds", "1_0"], "--seeds: '1_0' is not a whole number"),
        (["evaluate", "photos", "--strengths", "1", "1_0"], "--strengths: '1_0' is not a number"),
        (["compare", "--seeds", "1_0"], "--seeds: '1_0' is not a whole number"),
        (["compare", "--level", "0.0_5"], "--level: '0.0_5' is not a number"),
    ):
        with pytest.raises(SystemExit):
            arguments.parse_args(words)
        assert reported in capsys.readouterr().err


def test_no_argument_is_read_by_pythons_own_int_and_float() -> None:
    """int and float take 1_0, and float takes nan."""
    root = Path(arguments.__file__).parent
    own = [str(file) for file in root.rglob("*.py") if re.search(r"type=(int|float)\b", file.read_text("utf-8"))]
    assert not own, "use number_text.int_argument and float_argument"


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["sample", "a badge", "--steps", "0"], "--steps: 0 is too small; give at least 1"),
        (["sample", "a badge", "--count", "0"], "--count: 0 is too small"),
        (["sample", "a badge", "--strength", "nan"], "--strength: 'nan' is not a number"),
        (["teacher-preview", "photos", "--count", "-1"], "--count: -1 is too small"),
        (["train", "photos", "--output", "run", "--resolution", "0"], "--resolution: 0 is too small"),
        (["train", "photos", "--output", "run", "--checkpoint-blocks", "-1"], "--checkpoint-blocks: -1 is too small"),
        (["evaluate", "photos", "--steps", "0"], "--steps: 0 is too small"),
        (["evaluate", "photos", "--seeds", "0"], "--seeds: 0 is too small"),
        (["inspect-dataset", "photos", "--multiple", "0"], "--multiple: 0 is too small"),
        (["compare", "--seeds", "0"], "--seeds: 0 is too small"),
        (["demo", "--jobs", "0"], "--jobs: 0 is too small"),
    ],
)
def test_a_zero_is_not_taken_for_the_default(
    words: list[str], reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments.parse_args(words)
    assert reported in capsys.readouterr().err
