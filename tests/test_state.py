"""Checkpoints are whole or not there, the last good one survives, and damage is told by its place."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from dopsd_core.training.checkpoint import (
    Checkpoint,
    StateError,
    flatten_state,
    load_checkpoint,
    save_checkpoint,
    unflatten_state,
)


def make(step: int, value: float = 0.0) -> Checkpoint:
    tensors = {"a.lora_A.weight": torch.full((2, 3), value + step)}
    return Checkpoint(step, tensors, {}, {"0/exp_avg": torch.ones(2), "0/step": torch.tensor(1.0)}, {"n": [1.5, None]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded_step(folder: Path) -> int:
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.step


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", make(7))
    checkpoint = load_checkpoint(tmp_path / "c")
    assert checkpoint is not None and checkpoint.step == 7 and checkpoint.facts == {"n": [1.5, None]}
    assert checkpoint.teacher == {} and checkpoint.optimizer["0/step"].shape == ()
    torch.testing.assert_close(checkpoint.lora["a.lora_A.weight"], torch.full((2, 3), 7.0))


def test_none_yet(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None and load_checkpoint(tmp_path / "gone") is None


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-000003", "step-000004"]
    save_checkpoint(tmp_path, make(5), keep=1)
    assert names(tmp_path) == ["step-000005"]
    save_checkpoint(tmp_path, make(1_234_567), keep=2)
    assert loaded_step(tmp_path) == 1_234_567


@pytest.mark.parametrize("file", ["lora.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_any_damage_falls_back(tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, make(1))
    newest = save_checkpoint(tmp_path, make(2)) / file
    data = newest.read_bytes()
    middle = len(data) // 2
    changed = {"flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "cut": data[:-3], "empty": b""}
    newest.unlink() if damage == "gone" else newest.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING, "dopsd"):
        assert loaded_step(tmp_path) == 1
    assert "step-000002 is damaged" in caplog.text


def test_a_folder_under_another_step_is_damaged(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1))
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000009")
    assert loaded_step(tmp_path) == 1


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, make(1)) / "state.json").write_text("{}")
    with pytest.raises(StateError, match="every checkpoint .* is damaged; delete"):
        load_checkpoint(tmp_path)


def test_a_damaged_one_is_replaced_and_later_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make(step), keep=3)
    for step in (2, 3):
        (tmp_path / f"step-00000{step}" / "lora.safetensors").write_bytes(b"x")
    assert loaded_step(tmp_path) == 1
    save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["step-000002"] and loaded_step(tmp_path) == 2


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1))
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".unfinished-abc")
    assert loaded_step(tmp_path) == 1 and names(tmp_path) == ["step-000001"]


def test_a_full_disk_costs_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dopsd_core.training.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["step-000001"] and loaded_step(tmp_path) == 1


def test_optimizer_states_round_trip(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = optimizer.state_dict()["state"]
    tensors, values = flatten_state(state)
    assert json.loads(json.dumps(values)) == values
    torch.testing.assert_close(unflatten_state(tensors, values), state, rtol=0, atol=0)
    nested = {0: {"step": 3, "quant": {"absmax": torch.ones(2), "name": "dynamic"}}}
    torch.testing.assert_close(unflatten_state(*flatten_state(nested))[0]["quant"]["absmax"], torch.ones(2))
    assert unflatten_state(*flatten_state(nested))[0]["step"] == 3
