"""Checkpoints that are written while the run continues: the same files, and a kill or a full disk costs no more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_core.files.background import BackgroundWrite
from dopsd_core.files.disk import DiskError
from dopsd_core.training import checkpoint, run
from dopsd_core.training.checkpoint import load_checkpoint, saved_steps
from dopsd_core.training.log import StepReport
from dopsd_core.training.run_folder import saves_in_background
from dopsd_core.training.trainer import NoCallbacks, train
from tests.tiny import TinyDenoiser, killable_config, killable_data, saved_bytes

STEPS = 6
PATIENCE = 60


def config(every: int = 2, keep: int = 2) -> Any:
    return killable_config(STEPS).replace(checkpoint_every=every, keep_checkpoints=keep)


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background on a CPU too."""
    monkeypatch.setattr(run, "saves_in_background", lambda *_: True)


class Released(NoCallbacks):
    """Lets the write of step 2 end only when step 3 is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end, real = threading.Event(), checkpoint._write

        def late(folder: Path, state: checkpoint.Checkpoint) -> None:
            if state.step == 2:
                assert self.may_end.wait(PATIENCE), "step 3 waited for the checkpoint of step 2"
            real(folder, state)

        monkeypatch.setattr(checkpoint, "_write", late)

    def on_step(self, report: StepReport) -> None:
        if report.step == 3:
            self.may_end.set()


def test_a_write_ends_before_the_next_and_its_error_is_raised_once() -> None:
    background, order = BackgroundWrite(), []
    release = threading.Event()
    background.start(lambda: (release.wait(PATIENCE), order.append(1)))  # type: ignore[func-returns-value]
    background.raise_error()
    release.set()

    def fail() -> None:
        order.append(2)
        raise DiskError("full", is_full=True)

    background.start(fail)
    background.wait()
    assert order == [1, 2]
    with pytest.raises(DiskError, match="full"):
        background.raise_error()
    background.raise_error()


def test_the_files_are_those_of_a_run_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 2 is written after step 3, and is of step 2."""
    train(config(keep=9), TinyDenoiser(), killable_data(), tmp_path / "waits")
    always(monkeypatch)
    train(config(keep=9), TinyDenoiser(), killable_data(), tmp_path / "continues", Released(monkeypatch))
    for step in (2, 4, 6):
        for name in ("lora", "teacher", "optimizer"):
            part = Path("checkpoints", f"step-{step:06d}", f"{name}.safetensors")
            assert (tmp_path / "continues" / part).read_bytes() == (tmp_path / "waits" / part).read_bytes(), part
    assert saved_bytes(tmp_path / "continues") == saved_bytes(tmp_path / "waits")
    assert not [thread for thread in threading.enumerate() if thread.name == "dopsd-save"]


def killed_while_saving(folder: str) -> None:
    """Killed after step 5, while the checkpoint of step 4 is half written."""
    torch.set_num_threads(1)
    begun, real = threading.Event(), checkpoint._write_synced

    def half(path: Path, data: bytes) -> None:
        if "optimizer" in path.name and saved_steps(Path(folder) / "checkpoints") == [2]:
            path.write_bytes(data[: len(data) // 2])
            begun.set()
            threading.Event().wait(PATIENCE)
        real(path, data)

    class Kills(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 5:
                assert begun.wait(PATIENCE)
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write_synced = half
    run.saves_in_background = lambda *_: True
    train(config(), TinyDenoiser(), killable_data(), folder, Kills())


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX only")
def test_a_kill_meanwhile_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    train(config(), TinyDenoiser(), killable_data(), tmp_path / "uncut")
    child = multiprocessing.get_context("spawn").Process(target=killed_while_saving, args=(str(tmp_path / "cut"),))
    child.start()
    child.join(5 * PATIENCE)
    assert child.exitcode == -signal.SIGKILL
    folder = tmp_path / "cut" / "checkpoints"
    left = {path.name for path in folder.iterdir() if path.name.startswith("step-")}
    found = load_checkpoint(folder)
    assert left == {"step-000002"} and found is not None and found.step == 2
    train(config(), TinyDenoiser(), killable_data(), tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "uncut")
    assert not list(folder.glob(".*"))


def test_a_full_disk_is_reported_after_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    real, failed = checkpoint._write, threading.Event()

    def full(folder: Path, state: checkpoint.Checkpoint) -> None:
        if state.step == 4:
            failed.set()
            raise OSError(28, "No space left on device")
        real(folder, state)

    monkeypatch.setattr(checkpoint, "_write", full)

    class Waits(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 5:
                assert failed.wait(PATIENCE)
                for thread in threading.enumerate():
                    if thread.name == "dopsd-save":
                        thread.join(PATIENCE)

    with pytest.raises(DiskError, match="step-000004 could not be written: No space left.* the run resumes at step 5"):
        train(config(), TinyDenoiser(), killable_data(), tmp_path, Waits())
    assert saved_steps(tmp_path / "checkpoints") == [5, 2], "what was computed meanwhile is saved before leaving"


def test_where_it_is_done() -> None:
    cuda, lora = torch.device("cuda"), killable_config(STEPS)
    assert saves_in_background(lora, cuda) and not saves_in_background(lora, torch.device("cpu"))
    assert not saves_in_background(killable_config(STEPS, "full"), cuda)
