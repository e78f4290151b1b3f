"""What someone puts in the place of a run's LoRA file is neither taken for the run's nor lost."""

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dopsd_core.adapters.lora_file import read_safetensors
from dopsd_core.training.own_files import is_changed, is_foreign, keep_foreign
from dopsd_core.training.run_folder import LORA_NAME
from dopsd_core.training.trainer import TrainResult, train
from tests.tiny import TinyDenoiser, make_config, make_data

OTHER = "lora-of-another-run.safetensors"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(folder: Path, seed: int = 0, first: int = 3, **options: object) -> TrainResult:
    return train(make_config(**{"steps": 4, "seed": seed, **options}), TinyDenoiser(), make_data(first), folder)


def facts_of(path: Path) -> dict[str, str]:
    return read_safetensors(path)[1]


def test_a_replaced_lora_of_a_finished_run_stays_and_the_runs_own_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = trained(tmp_path / "run").lora_path
    wanted = read_safetensors(own)[0]
    strangers = trained(tmp_path / "other", seed=1).lora_path.read_bytes()
    for kept in (OTHER, "lora-of-another-run-2.safetensors"):
        own.write_bytes(strangers)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dopsd"):
            result = trained(tmp_path / "run")
        found = read_safetensors(result.lora_path)[0]
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert (tmp_path / "run" / kept).read_bytes() == strangers
        assert [line for line in caplog.messages if "was not written by this run" in line and kept in line]


def test_own_files_are_written_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of an earlier step, of fewer steps, damaged, and from before files said what they hold."""
    with caplog.at_level(logging.WARNING, "dopsd"):
        path = trained(tmp_path).lora_path
        trained(tmp_path)
        trained(tmp_path, steps=6)
        assert facts_of(path)["dopsd_step"] == "6"
        tensors, header = read_safetensors(path)
        save_file(tensors, path, {key: value for key, value in header.items() if "hash" not in key})
        trained(tmp_path, steps=6)
        path.write_bytes(path.read_bytes()[:-100])
        trained(tmp_path, steps=6)
    assert facts_of(path)["dopsd_step"] == "6" and "modelspec.hash_sha256" in facts_of(path)
    assert not list(tmp_path.glob("*another*")) and not caplog.messages


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"first": 2}, {"rank": 3}, {"objective": "sft"}],
    ids=["another seed", "another dataset", "another rank", "another objective"],
)
def test_another_runs_file_is_foreign(tmp_path: Path, other: dict[str, object]) -> None:
    facts = facts_of(trained(tmp_path / "own").lora_path)
    path = trained(tmp_path / "other", **other).lora_path  # type: ignore[arg-type]
    assert is_foreign(path, facts) and not is_foreign(path, facts_of(path))


def test_another_trainers_file_and_changed_tensors_are_foreign(tmp_path: Path) -> None:
    path = trained(tmp_path).lora_path
    tensors, header = read_safetensors(path)
    assert not is_foreign(path, header, 4) and is_foreign(path, header, 3)
    save_file(tensors, path)
    assert is_foreign(path, header) and is_changed(path, 4) and not is_changed(path)
    save_file({key: value * 2 for key, value in tensors.items()}, path, header)
    assert is_foreign(path, header, 4) and is_changed(path, 4)


def test_nothing_is_kept_where_there_is_nothing(tmp_path: Path) -> None:
    assert keep_foreign(tmp_path / LORA_NAME, {}) is None
    assert os.listdir(tmp_path) == []
