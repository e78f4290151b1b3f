"""The command line offers its pieces, finds mistakes, and covers every setting."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dopsd_core import arguments
from dopsd_core.__main__ import main
from dopsd_core.adapters.lora_config import LoraConfig
from dopsd_core.config import ConfigError, TrainConfig

DEFAULTS: dict[str, Any] = {"lora": LoraConfig(rank=8, alpha=16.0, targets=("to_q",)), "steps": 50}


def parse(*words: str) -> Any:
    return arguments.make_parser().parse_args(["train", "photos", "--output", "run", *words])


def test_help_is_quick_and_names_every_command() -> None:
    code = "import sys, dopsd_core.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(re.search(rf"\n    {command}\s", result.stdout) for command in arguments.COMMANDS)


@pytest.mark.parametrize("command", arguments.COMMANDS)
def test_every_argument_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and len(capsys.readouterr().out) > 500
    subparsers = next(action for action in arguments.make_parser()._actions if action.dest == "command")
    for action in subparsers.choices[command]._actions:  # type: ignore[index, union-attr]
        assert action.help, action.dest


def test_every_setting_has_an_option() -> None:
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"lora", "family"}
    assert set(arguments._CONFIG_OPTIONS) == fields


def test_options_over_defaults_and_over_a_file(tmp_path: Path) -> None:
    assert arguments.config_from_args(parse(), DEFAULTS) == TrainConfig(**DEFAULTS)
    config = arguments.config_from_args(parse("--lr", "0.002", "--rank", "4", "--teacher", "frozen"), DEFAULTS)
    assert (config.lr, config.steps, config.teacher) == (0.002, 50, "frozen")
    assert (config.lora.rank, config.lora.alpha) == (4, 8.0)
    (tmp_path / "config.json").write_text(config.to_json())
    words = ("--config", str(tmp_path / "config.json"), "--alpha", "1", "--targets", "a", "b", "--grad-steps", "2")
    other = arguments.config_from_args(parse(*words), DEFAULTS)
    assert other == dataclasses.replace(config, grad_steps=2, lora=LoraConfig(rank=4, alpha=1.0, targets=("a", "b")))
    with pytest.raises(ConfigError, match="steps is 0"):
        arguments.config_from_args(parse("--steps", "0"), DEFAULTS)
    with pytest.raises(ConfigError, match="rank must be"):
        arguments.config_from_args(parse("--rank", "9999"), DEFAULTS)


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
    assert "holds edits, and the demo model does not edit" in capsys.readouterr().err


def test_mistakes_are_told_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-dataset", str(tmp_path), "--resolution", "3"]) == 1
    assert "error: a pixel budget of 9" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "a.png"}))
    assert main(["inspect-dataset", str(tmp_path / "a.jsonl")]) == 1
