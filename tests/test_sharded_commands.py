"""The real command on a small model of Z-Image's architecture: all weights on two processes are those of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dopsd_core.adapters.full_weights import FullWeights
from dopsd_core.standalone.tracking import Tracking
from dopsd_core.standalone.training import _watching
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.sharded_checkpoint import load_sharded
from tests import model_folders
from tests.test_standalone_commands import TORCHRUN, call, command

pytest.importorskip("diffusers")


def students(folder: Path) -> dict[str, Tensor]:
    """The newest checkpoint's student, whole."""
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 5
    weights = FullWeights(torch.nn.Linear(1, 1))
    return dict(load_sharded(checkpoint, weights, weights.parameters()).lora)


@pytest.mark.long
def test_two_processes_make_the_model_of_one(tmp_path: Path) -> None:
    model_folders.write_z_image(tmp_path / "model")
    model_folders.write_vision(tmp_path / "vision")
    photos = model_folders.write_photos(tmp_path / "photos", "a [V] badge")
    options = (
        *("--adapter", "full", "--steps", 5, "--warmup", 1, "--lr", "1e-3", "--rollout-steps", 2, "--resolution", 64),
        *("--batch-size", 1, "--grad-accumulation", 2, "--preview-every", 5, "--checkpoint-every", 5),
    )
    found = {}
    for name, launcher in (("one", ("-m", "dopsd_core")), ("two", TORCHRUN)):
        words = command(tmp_path, "train", photos, "--output", tmp_path / name, *options, launcher=launcher)
        result = call(words)
        assert result.returncode == 0, result.stdout + result.stderr
        found[name] = students(tmp_path / name)
    assert found["one"].keys() == found["two"].keys()
    change = sum(float((found["two"][name] - value).square().sum()) for name, value in found["one"].items())
    whole = sum(float(value.square().sum()) for value in found["one"].values())
    assert (change / whole) ** 0.5 < 1e-5
    sheets = [Image.open(tmp_path / name / "previews" / "step-000005.png").convert("RGB") for name in found]
    assert sheets[0].size == sheets[1].size
    assert (tmp_path / "two" / "transformer" / "config.json").is_file()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_after_the_step_where_weights_are_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere the first process saves what it has; here it would have a part. A launcher sends the signal again."""
    bar = tqdm(disable=True)
    with _watching(bar, None, Tracking(()), writes=True, in_parts=True) as callbacks:
        assert not callbacks.should_stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert callbacks.should_stop()
    assert capsys.readouterr().out.count("stopping after this step") == 1
    with pytest.raises(KeyboardInterrupt), _watching(bar, None, Tracking(()), writes=True):
        signal.raise_signal(signal.SIGINT)
