"""SFT on the model before its distillation from the command line: refused for other objectives, named in the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dopsd_core.__main__ import main
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.model_files import PARENT_FILE
from dopsd_core.standalone.hosts import model as host_models
from dopsd_core.standalone.hosts.demo import load_demo_model, load_undistilled


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_dataset(make_concept(0), tmp_path / "data")
    short = ["--steps", "1", "--warmup", "0", "--probe-every", "0", "--batch-size", "1"]
    return ["train", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--model", "demo-undistilled", *short]


@pytest.mark.parametrize("objective", ["dopsd", "dreambooth", "pso"])
def test_objectives_of_few_steps_are_refused(
    words: list[str], objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--objective", objective]) == 1
    assert f"objective {objective} needs the few steps of the distilled model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sft_trains_it_and_the_lora_says_so(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in: the distilled transformer with other weights."""
    torch.set_num_threads(1)
    other: Any = load_demo_model().denoiser
    with torch.no_grad():
        next(other.transformer.parameters()).mul_(1.5)
    monkeypatch.setattr(host_models, "load_undistilled", lambda: (other, "parent"))
    assert main([*words, "--objective", "sft"]) == 0
    assert "use it on the distilled model" in capsys.readouterr().out
    with safe_open(tmp_path / "run" / "lora.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["dopsd_undistilled"], facts["dopsd_base_fingerprint"]) == ("demo-undistilled", "parent")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=PARENT_FILE):
        load_undistilled(tmp_path)
