"""What trackers get of a run; train.jsonl is written with or without them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dopsd_core.standalone import tracking
from dopsd_core.standalone.model_options import TRACKERS
from dopsd_core.standalone.settings import family_config
from dopsd_core.standalone.tracking import Tracking, chosen_trackers, open_tracking
from dopsd_core.standalone.training import _tracking
from dopsd_core.training.log import StepReport

REPORT = StepReport(
    step=3, loss=0.5, metrics={"gap": 0.25, "cosine": 0.9, "norm_ratio": 1.1}, relative_gap=0.75, lr=1e-3,
    grad_norm=2.0, seconds=1.5,
)  # fmt: skip


class Recorder:
    """Has what the interface of accelerate's trackers has."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("log", step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("images", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_everything_measured_is_passed_on() -> None:
    recorder, sheet = Recorder(), Image.new("RGB", (8, 4), "red")
    followed = Tracking([recorder])
    followed.on_step(REPORT)
    followed.on_preview(3, sheet)
    followed.close()
    _, step, values = recorder.calls[0]
    expected = {
        "loss": 0.5, "gap": 0.25, "cosine": 0.9, "norm_ratio": 1.1, "relative_gap": 0.75, "lr": 1e-3, "grad_norm": 2.0,
        "seconds": 1.5, "anchors": 0,
    }  # fmt: skip
    assert step == 3 and {name: values[name] for name in expected} == expected
    assert set(values) - set(expected) <= {"peak_memory_gb"}
    assert recorder.calls[1:] == [("images", 3, {"preview": [sheet]}), ("finish",)]


@pytest.mark.parametrize(
    ("given", "installed", "expected"),
    [
        (["auto"], {"tensorboard"}, ("tensorboard",)),
        (["auto"], set(), ()),
        (["none"], {"tensorboard"}, ()),
        (["wandb", "tensorboard"], {"wandb", "tensorboard"}, ("wandb", "tensorboard")),
    ],
)
def test_which_trackers_are_used(
    monkeypatch: pytest.MonkeyPatch, given: list[str], installed: set[str], expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(tracking, "_is_installed", lambda name: name in installed)
    assert chosen_trackers(given) == expected


def test_every_choice_has_a_package() -> None:
    assert set(TRACKERS) == {"auto", "none", *tracking._PACKAGES}


def test_a_tracker_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_is_installed", lambda name: False)
    with pytest.raises(ValueError, match="--track wandb needs wandb, which is not installed: pip install wandb"):
        chosen_trackers(["wandb"])


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_tracker_that_nobody_asked_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked_for: bool
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise ImportError("cannot import name 'SummaryWriter'\nand more")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    args = Namespace(trackers=("tensorboard",), output=tmp_path / "run", track=["tensorboard" if asked_for else "auto"])
    message = "--track tensorboard cannot be started: cannot import name 'SummaryWriter'"
    if asked_for:
        with pytest.raises(ValueError) as caught:
            _tracking(args)
        assert str(caught.value) == message
    else:
        assert not _tracking(args).trackers
        assert f"{message}; the curves are in train.jsonl alone" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    followed = open_tracking(("tensorboard",), tmp_path / "run")
    followed.begin(family_config("z_image"))
    followed.on_step(REPORT)
    followed.on_preview(3, Image.new("RGB", (8, 4), "red"))
    followed.close()
    read = EventAccumulator(str(tmp_path / "run" / tracking.TRACKING_NAME / "dopsd"))
    read.Reload()
    (loss,) = read.Scalars("loss")
    assert (loss.step, loss.value) == (3, 0.5) and "relative_gap" in read.Tags()["scalars"]
    assert [image.step for image in read.Images("preview")] == [3]
