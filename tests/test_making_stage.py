"""Stages of the demo model's making: a stopped one resumes with the same steps, whoever runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dopsd_core.standalone.making.checkpoint import Checkpoints, part, with_prefix
from dopsd_core.standalone.making.optim import SharedMuon
from dopsd_core.standalone.making.stage import Stage, StageRun
from dopsd_core.standalone.making.twins import Twins

ALONE = Twins(0, 1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2, bias=False))


def run(folder: Path, steps: int, minutes: float = 0.0) -> bool:
    """One worker's stage on a fixed regression; with `minutes` it stops after its first step."""
    model = network()
    stage = Stage("toy", folder, steps, 8, 100, warmup=2, average=0.9, minutes=minutes)

    def loss(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(batch, 4, generator=generator)
        value = (model(x) - x[:, :2]).square().mean()
        return value, {"loss": value.item()}

    return StageRun(ALONE, stage, model, SharedMuon(ALONE, model.named_parameters(), 0.02, 0.01)).run(loss)


def test_a_stage_stopped_after_every_step_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    assert run(whole, 6)
    for _ in range(5):
        assert not run(pieces, 6, minutes=1e-9)
    assert run(pieces, 6)
    a, b = load_file(whole / "toy.safetensors"), load_file(pieces / "toy.safetensors")
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["0.weight"], network().state_dict()["0.weight"])


def test_only_the_newest_two_saves_are_kept_and_all_files_are_safetensors_or_json(tmp_path: Path) -> None:
    for _ in range(4):
        run(tmp_path, 9, minutes=1e-9)
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == ["step_000003", "step_000004"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl"}


def test_a_save_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, "toy", ALONE)
    saves.save(3, {"a": torch.ones(2)})
    broken = tmp_path / "toy" / "step_000009"
    broken.mkdir()
    (broken / "rank_0.safetensors").write_bytes(b"cut off")
    found = saves.load()
    assert found is not None and found[0] == 3 and torch.equal(found[1]["a"], torch.ones(2))


def test_a_stage_without_a_save_starts_at_the_beginning(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, "toy", ALONE).load() is None


def stepped(rank: int, world: int) -> tuple[nn.Sequential, SharedMuon]:
    """An optimizer after one step on equal gradients; its updates are not exchanged."""
    model = network()
    twins = Twins(rank, world)
    twins.broadcast = lambda tensor, source: None  # type: ignore[method-assign]
    optimizer = SharedMuon(twins, model.named_parameters(), 0.02, 0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    return model, optimizer


def test_the_state_of_two_workers_is_that_of_one() -> None:
    _, alone = stepped(0, 1)
    parts = [stepped(rank, 2)[1].tensors(shared=rank == 0) for rank in (0, 1)]
    merged = {**parts[0], **parts[1]}
    whole = alone.tensors(shared=True)
    assert set(merged) == set(whole) and not set(parts[0]) & set(parts[1])
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    model = network()
    again = SharedMuon(ALONE, model.named_parameters(), 0.02, 0.01)
    again.load_tensors(merged)
    assert all(torch.equal(again.tensors(shared=True)[name], whole[name]) for name in whole)


def test_optimizer_state_takes_the_memory_format_of_its_parameter() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = SharedMuon(ALONE, conv.named_parameters(), None, 0.01)
    optimizer.load_tensors({"weight/exp_avg": torch.ones(4, 3, 3, 3), "weight/step": torch.tensor(2.0)})
    assert optimizer.adamw.state[conv.weight]["exp_avg"].stride() == conv.weight.stride()


def test_part_removes_the_prefix_that_was_added() -> None:
    tensors = {"a": torch.ones(1), "b.c": torch.zeros(2)}
    assert part({**with_prefix("model.", tensors), "other.a": torch.ones(3)}, "model.") == tensors


@pytest.mark.parametrize("flags", [(True, False), (False, False)])
def test_one_worker_agrees_with_itself(flags: tuple[bool, bool]) -> None:
    assert ALONE.agreed(flags) == list(flags)
