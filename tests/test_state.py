"""Checkpoints are whole or not there, the last good one survives, and damage is reported with its place."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dopsd_core.files.disk import DiskError
from dopsd_core.optimizers.state import flatten_state, unflatten_state
from dopsd_core.training.checkpoint import Checkpoint, StateError, load_checkpoint, save_checkpoint, unflatten_paths


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
    with pytest.raises(
        DiskError, match=r"step-000002 could not be written: No space .*needed, .* free\); free up some space"
    ):
        save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["step-000001"] and loaded_step(tmp_path) == 1


# -- the optimizer's state ---------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Equal in values, in kinds of containers and keys, in order, and bit for bit in tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        keys = [(type(key), key) for key in one], [(type(key), key) for key in other]
        return keys[0] == keys[1] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def through_a_file(state: dict, folder: Path) -> Any:
    tensors, rest = flatten_state(state)
    save_checkpoint(folder, Checkpoint(1, {}, {}, tensors, {"rest": rest}))
    loaded = load_checkpoint(folder)
    assert loaded is not None
    return unflatten_state(loaded.optimizer, loaded.facts["rest"])


TENSORS = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(7.0),
        torch.zeros(0, 2),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.tensor([1e-40, -0.0], dtype=torch.float64),
        torch.ones(3, dtype=torch.bfloat16)[1:],
    ]
)
STATES = st.recursive(
    st.one_of(TENSORS, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(0, 12), st.text("0/~ab", max_size=4)), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(st.sampled_from(["state", "param_groups", "a/b", "0", "~1"]), STATES, max_size=3))
def test_any_optimizer_state_round_trips(tmp_path: Path, state: dict) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    assert same(through_a_file(state, tmp_path / "c"), state)


def test_the_whole_state_of_adamw_round_trips(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = optimizer.state_dict()
    assert same(through_a_file(state, tmp_path), state)
    assert set(flatten_state(state)[0]) == {f"state/{n}/{k}" for n in (0, 1) for k in ("step", "exp_avg", "exp_avg_sq")}


def test_tensors_that_share_memory_become_copies(tmp_path: Path) -> None:
    """As the tables of 8-bit optimizers do; and the nested form in which bitsandbytes gives its state away."""
    table, rows = torch.linspace(-1, 1, 256), torch.arange(12.0).reshape(3, 4)
    nested = {"__bnb_optimizer_quant_state__": {"qmap1": table, "absmax1": rows[0], "state1": rows[1:].to(torch.uint8)}}
    state = {"state": {0: {"qmap1": table, "part": rows[1], **nested}, 1: {"qmap1": table, "whole": rows, **nested}}}
    loaded = through_a_file(state, tmp_path)
    assert same(loaded, state)
    loaded["state"][0]["qmap1"].zero_()
    assert loaded["state"][1]["qmap1"].any() and table.any()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state": {0: {"hook": object()}}}, "contains a object at state/0/hook, which cannot be saved"),
        ({"state": {(1, 2): 3}}, r"has the key \(1, 2\) at state; use a str or an int"),
        ({None: 1}, "has the key None at its top"),
        ({True: 1}, "has the key True"),
    ],
)
def test_what_cannot_be_kept_is_said(state: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        flatten_state(state)


def test_states_by_path_of_release_0_2_are_read() -> None:
    tensors = {"0/exp_avg": torch.ones(2), "0/quant/absmax": torch.ones(3)}
    state = unflatten_paths(tensors, {"0/step": 3, "0/quant/name": "dynamic"})
    assert same(
        state, {0: {"exp_avg": torch.ones(2), "quant": {"absmax": torch.ones(3), "name": "dynamic"}, "step": 3}}
    )
