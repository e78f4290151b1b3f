"""All weights of the real architectures, small: two processes that hold a part each make the model of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dopsd_core.adapters.full_weights import FullWeights
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.sharded_checkpoint import load_sharded
from tests.sharded_runs import on_processes

pytest.importorskip("diffusers")

from tests.sharded_networks import KINDS, STEPS, Networks, _config, training  # noqa: E402


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family by the same two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    codes, errors = on_processes(2, Networks(folder, _config("krea2")), wait=300)
    assert codes == [0, 0], errors
    return folder


@pytest.mark.parametrize("family", KINDS)
def test_two_processes_make_the_model_of_one(sharded: Path, tmp_path: Path, family: str) -> None:
    training(family, tmp_path)
    untouched = dict(KINDS[family].network().named_parameters())
    for part in ("lora", "teacher"):
        ours, theirs = (weights(folder, part) for folder in (sharded / family, tmp_path))
        assert ours.keys() == theirs.keys() == untouched.keys()
        assert difference(ours, theirs) < 1e-5 < 1e-4 < difference(theirs, untouched), part


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    """Those of student ("lora") or teacher after the last step, whole."""
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STEPS
    alone = FullWeights(torch.nn.Linear(1, 1))
    return dict(getattr(load_sharded(checkpoint, alone, alone.parameters()), part))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to the norm of all weights."""
    change = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items())
    return (change / sum(float(value.square().sum()) for value in theirs.values())) ** 0.5
