"""All weights on several processes that hold a part each: the run of one process, its files, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dopsd_core.config import ConfigError
from dopsd_core.optimizers import OPTIMIZERS
from dopsd_core.training.checkpoint import PARTS, Checkpoint, load_checkpoint
from dopsd_core.training.log import read_log
from dopsd_core.training.trainer import train
from dopsd_core.training.world import OneProcess, Peers, Turn
from tests.ranks import ThreadWorld
from tests.sharded_runs import STEPS, NetDenoiser, OtherModes, Rank, full_config, on_processes, run, whole_checkpoint
from tests.stopping import StopAt
from tests.tiny import killable_data


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, full_config(preview_every=2))
    return folder


def sharded(folder: Path, config: Any, size: int = 2, **options: Any) -> None:
    codes, errors = on_processes(size, Rank(folder, config, **options))
    assert codes == [0] * size, errors


def largest_difference(ours: Checkpoint, theirs: Checkpoint) -> float:
    """Relative to the largest value of each tensor, over weights, teacher and optimizer.

    Not of the keys' biases: their gradient is zero up to rounding, which Adam enlarges to steps.
    """
    differences = []
    for part in PARTS:
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert mine.keys() == other.keys() and mine
        for name, value in mine.items():
            wanted: Tensor = other[name]
            assert value.shape == wanted.shape and value.dtype == wanted.dtype, name
            if not name.endswith("to_k.bias"):
                differences.append(float((value - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)))
    return max(differences)


# -- the same run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        pytest.param(
            4, {}, marks=pytest.mark.long
        ),  # prior anchors and m of K: ranks whose batches differ in their forwards
        pytest.param(2, {"grad_steps": None, "states": "teacher"}, marks=pytest.mark.long),
        pytest.param(2, {"teacher": "frozen", "anchor_probability": 0.5}, marks=pytest.mark.long),
        pytest.param(2, {"teacher": "same"}, marks=pytest.mark.long),
    ],
    ids=["ema", "ema of four", "states of the teacher", "frozen", "same"],
)
def test_the_run_is_that_of_one_process(tmp_path: Path, whole: Path, size: int, options: dict[str, Any]) -> None:
    config, many, one = (
        full_config(preview_every=2, **options),
        tmp_path / "many",
        tmp_path / "one" if options else whole,
    )
    if options:
        run(one, config)
    sharded(many, config, size)
    ours, theirs = (whole_checkpoint(folder, config) for folder in (many, one))
    if config.teacher.name != "ema":
        assert not ours.teacher and not theirs.teacher
        ours, theirs = (Checkpoint(c.step, c.lora, c.lora, c.optimizer, c.facts) for c in (ours, theirs))
    assert ours.step == theirs.step == STEPS and largest_difference(ours, theirs) < 1e-3
    moved = max(float((ours.lora[name] - value.detach()).abs().max()) for name, value in untouched().items())
    assert moved > 1e-3
    logs = [read_log(folder / "train.jsonl") for folder in (many, one)]
    for report, other in zip(*logs, strict=True):
        assert report.anchors == other.anchors
        for figure in ("loss", "grad_norm", "relative_gap", "heldout_relative_gap"):
            wanted = getattr(other, figure)
            assert getattr(report, figure) == (None if wanted is None else pytest.approx(wanted, rel=1e-3)), figure
    sheets = [sorted((folder / "previews").iterdir()) for folder in (many, one)]
    assert [sheet.name for sheet in sheets[0]] == [f"step-{step:06d}.png" for step in (0, 2, 4, 6)]
    assert Image.open(sheets[0][0]).tobytes() == Image.open(sheets[1][0]).tobytes()  # three prompts on two or four
    models = [load_file(folder / "model.safetensors") for folder in (many, one)]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        for ours, theirs in zip(determined(name, value), determined(name, models[1][name]), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4), name


def determined(name: str, value: Tensor) -> tuple[Tensor, ...]:
    """The parts of a saved tensor that the training determines: not the keys' bias, see `largest_difference`."""
    if name.endswith("qkv.bias"):
        query, _, values = value.chunk(3)
        return query, values
    return () if name.endswith("to_k.bias") else (value,)


def untouched() -> dict[str, Tensor]:
    return dict(NetDenoiser().network().named_parameters())


@pytest.mark.long
def test_a_network_in_bf16_keeps_its_masters_in_fp32(tmp_path: Path) -> None:
    config = full_config()
    run(tmp_path / "one", config, dtype="bfloat16")
    sharded(tmp_path / "two", config, dtype="bfloat16")
    ours, theirs = (whole_checkpoint(tmp_path / name, config, "bfloat16") for name in ("two", "one"))
    assert {value.dtype for value in ours.lora.values()} == {torch.float32}
    assert largest_difference(ours, theirs) < 2e-2  # gradients in bf16 are added up in another order
    assert any(not torch.equal(value, value.bfloat16().float()) for value in ours.lora.values())


@pytest.mark.parametrize(
    "objective", ["sft", *(pytest.param(name, marks=pytest.mark.long) for name in ("dreambooth", "pso"))]
)
def test_the_baselines_too(tmp_path: Path, objective: str) -> None:
    options = {
        "sft": {"sft_anchor_probability": 0.4},
        "dreambooth": {"dreambooth_class_images": 4},
        "pso": {"pso_loser_images": 4, "pso_form": "dpo"},
    }
    config = full_config(objective=objective, **options[objective])
    run(tmp_path / "one", config)
    sharded(tmp_path / "two", config)
    ours, theirs = (whole_checkpoint(tmp_path / name, config) for name in ("two", "one"))
    assert largest_difference(ours, theirs) < 1e-3


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_resumes_on_any_number_of_processes(tmp_path: Path, whole: Path) -> None:
    config = full_config()
    for size, stop in ((1, 1), (2, 2), (1, 4), (4, STEPS)):
        if size == 1:
            run(tmp_path, config, callbacks=StopAt(stop))
        else:
            sharded(tmp_path, config, size, stop_at=stop)
    assert largest_difference(whole_checkpoint(tmp_path, config), whole_checkpoint(whole, config)) < 1e-3


@pytest.mark.parametrize(
    "killed",
    [pytest.param({1: 4}, marks=pytest.mark.long), {0: 4}, pytest.param({0: 4, 1: 4}, marks=pytest.mark.long)],
    ids=["one", "the writer", "all"],
)
def test_killed_and_resumed(tmp_path: Path, whole: Path, killed: dict[int, int]) -> None:
    config = full_config()
    codes, _ = on_processes(2, Rank(tmp_path / "cut", config, killed_at=killed))
    assert all(codes[rank] == -9 for rank in killed) and 0 not in codes
    checkpoint = load_checkpoint(tmp_path / "cut" / "checkpoints")
    assert checkpoint is not None and 0 < checkpoint.step <= 4
    sharded(tmp_path / "cut", config)
    assert largest_difference(whole_checkpoint(tmp_path / "cut", config), whole_checkpoint(whole, config)) < 1e-3


@pytest.mark.long
def test_a_damaged_shard_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    config = full_config()
    sharded(tmp_path, config)
    newest = max((tmp_path / "checkpoints").iterdir())
    shard = next((newest / "optimizer").iterdir())
    shard.write_bytes(shard.read_bytes()[:-4] + b"\1\2\3\4")
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step < STEPS
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    assert set(state["sha256"]) == {p.relative_to(newest).as_posix() for p in newest.glob("*/*")}
    assert (
        not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.distcp")) and not list(tmp_path.rglob(".meta*"))
    )


# -- together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_have_batches_of_one_course_at_the_same_time(size: int) -> None:
    courses = [number % 3 == 0 for number in range(12)]
    shares = []
    for rank in range(size):
        peers = Peers(ThreadWorld(rank, size, None, []))  # type: ignore[arg-type]  # it does not talk
        peers.run_in_step()
        shares.append(peers.share(courses))
    for turns in zip(*shares, strict=True):
        assert len({courses[turn.number] for turn in turns}) == 1
    counted = [turn.number for turns in shares for turn in turns if turn.counts]
    assert sorted(counted) == list(range(12))


def test_alone_or_with_whole_weights_each_batch_has_its_turn() -> None:
    assert Peers(OneProcess()).share([(), ()]) == [Turn(0), Turn(1)]
    assert Peers(ThreadWorld(1, 2, None, [])).share([()] * 4) == [Turn(2), Turn(3)]  # type: ignore[arg-type]


def test_ranks_that_would_gather_a_mixture_of_weights_notice(tmp_path: Path) -> None:
    codes, errors = on_processes(2, OtherModes(tmp_path, full_config()))
    assert codes == [1, 1] and len(errors) == 2
    assert all("compute with different weights at the same time" in error for error in errors), errors


@pytest.mark.parametrize("fails_at", [40, 41], ids=["in the teacher's forward", "in the student's"])
def test_the_rank_that_fails_ends_all(tmp_path: Path, fails_at: int) -> None:
    """Also where it has switched to other weights: to switch back, it must not wait for the others."""
    codes, errors = on_processes(2, Rank(tmp_path, full_config(), fails_at=fails_at, only_rank=1), wait=60)
    assert codes == [1, 1]
    assert "rank 1: RuntimeError: CUDA out of memory" in errors
    assert any(error.startswith("rank 0: LostPeer: another process of this run was lost") for error in errors), errors


def test_what_does_not_work_in_parts_is_refused_before_any_work(tmp_path: Path) -> None:
    class World(OneProcess):
        rank, size, mesh = 0, 2, object()

    for change, words in (
        ({"batch_size": 2}, "batch_size is 2; set it to 1"),
        ({"optimizer": "adafactor"}, "optimizer adafactor does not work"),
        ({"grad_accumulation": 3}, "2 processes cannot share equally"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(full_config(**change), NetDenoiser(), killable_data(), tmp_path, world=World())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert [name for name, optimizer in OPTIMIZERS.items() if optimizer.takes_parts] == ["adamw"]
