"""A disk that is full or read-only: found before training, survived during it, and said with place and remedy."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.files import disk
from dopsd_core.files.atomic import write_atomic
from dopsd_core.files.disk import DiskError, Reserve, format_bytes, free_bytes, require_room, require_writable, writing
from dopsd_core.memory.footprint import saved_bytes
from dopsd_core.optimizers import AdamW
from dopsd_core.teachers import TEACHERS, EmaTeacher
from dopsd_core.trainable import Trainable
from dopsd_core.training.checkpoint import load_checkpoint, saved_steps
from dopsd_core.training.log import RunLog, StepReport, read_log
from dopsd_core.training.run_folder import check_run_folder
from dopsd_core.training.trainer import NoCallbacks, NonFiniteError, train
from tests.tiny import TinyDenoiser, make_config, make_data
from tests.tiny import saved_bytes as bytes_of

MB = 10**6
LARGE: dict[str, Any] = {"rank": 1024, "alpha": 16.0, "targets": ("*",)}


def fails_with(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# -- what errors say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy", "is_full"),
    [
        (
            errno.ENOSPC,
            r"No space left on device \(2\.0 MB needed, [\d.]+ [MG]B free\); free up some space there",
            True,
        ),
        (errno.EDQUOT, r"uota exceeded \(2\.0 MB needed, [\d.]+ [MG]B free\); free up some space there", True),
        (errno.EROFS, "Read-only file system; allow writing there, or choose another output folder", False),
        (errno.EACCES, "Permission denied; allow writing there, or choose another output folder", False),
        (errno.EIO, "Input/output error; check the disk and the folder", False),
    ],
)
def test_an_error_names_path_need_room_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str, is_full: bool
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fails_with(number))
    with pytest.raises(DiskError, match=f"x.bin could not be written: .*{remedy}$") as caught:
        write_atomic(path, bytes(2 * MB))
    assert caught.value.is_full == is_full and str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"] and path.read_bytes() == b"old"


def test_an_error_is_explained_once(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="^inner$"), writing(tmp_path):
        raise DiskError("inner")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError


def test_a_line_of_the_log_that_is_cut_is_an_error(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "train.jsonl", -1)
    log.append(StepReport(step=1))
    whole, log._file = log._file, SimpleNamespace(write=lambda row: len(row) - 1, close=lambda: None)  # type: ignore
    with pytest.raises(DiskError, match=r"train\.jsonl could not be written: No space"):
        log.append(StepReport(step=2))
    whole.close()
    assert [report.step for report in read_log(log.path)] == [1]


# -- before training ---------------------------------------------------------------------------------------------------


def test_room_is_checked_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * MB))
    require_room(tmp_path, 3 * MB)
    with pytest.raises(
        DiskError, match=r"new/run needs 5\.0 MB .*, and 3\.0 MB are free there: free up 2\.0 MB, or choose"
    ):
        require_room(tmp_path / "new" / "run", 5 * MB)
    assert not (tmp_path / "new").exists()


def test_where_the_system_cannot_tell_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", fails_with(errno.ENOSYS))
    assert free_bytes(tmp_path) is None
    require_room(tmp_path, 10**18)


def test_a_folder_that_cannot_be_written_is_found_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file/run could not be written: Not a directory"):
        require_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "mkdir", fails_with(errno.EROFS))
    with pytest.raises(DiskError, match="new could not be written: Read-only file system; allow writing"):
        require_writable(tmp_path / "new")


@pytest.mark.parametrize("where", ["run", "mkdir"])
def test_a_run_is_refused_before_the_network_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "mkdir":
        monkeypatch.setattr(os, "mkdir", fails_with(errno.EROFS))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    denoiser = TinyDenoiser()
    with pytest.raises(DiskError, match="run needs .* free" if where == "run" else "Read-only"):
        train(make_config(), denoiser, make_data(), tmp_path / "run")
    assert denoiser.calls == 0 and not (tmp_path / "run").exists()


def test_need_counts_what_will_be_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[int] = []
    monkeypatch.setattr("dopsd_core.training.run_folder.require_room", lambda folder, size: needs.append(size))
    denoiser = TinyDenoiser()
    each = saved_bytes(2 * (4 + 16) * 2, 4, EmaTeacher(), AdamW())

    def checkpoints(host: int = 0, **settings: Any) -> float:
        check_run_folder(make_config(**settings), denoiser, tmp_path, host)
        return (needs.pop() - 2 * each.lora - host) / each.checkpoint

    assert checkpoints(steps=12, checkpoint_every=3) == 3  # two are kept while a third is written
    assert checkpoints(steps=12, checkpoint_every=3, keep_checkpoints=1) == 2
    assert checkpoints(steps=12, checkpoint_every=100, host=77) == 1
    assert checkpoints(steps=12, checkpoint_every=1, keep_checkpoints=50) == 12
    for step in (3, 6):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert checkpoints(steps=12, checkpoint_every=3) == 1
    check_run_folder(make_config(steps=6), denoiser, tmp_path)
    assert needs == [each.lora]


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_the_sizes_are_those_of_the_files(tmp_path: Path, teacher: Any) -> None:
    """Never less, and not much more where there is much to write."""
    config = make_config(**LARGE, steps=1, teacher=teacher)
    result = train(config, TinyDenoiser(), make_data(), tmp_path)
    elements = 1024 * (4 + 16 + 6 + 16 + 16 + 4)
    expected = saved_bytes(elements, 6, TEACHERS.validated(teacher), AdamW())
    written = sum(file.stat().st_size for file in result.checkpoint_path.iterdir())
    assert written <= expected.checkpoint < 1.4 * written
    assert result.lora_path.stat().st_size <= expected.lora < 2 * result.lora_path.stat().st_size


# -- the room that is held ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is held where the system can promise it")
def test_room_is_held_without_a_name_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[IO[bytes]] = []
    real = disk._allocate
    monkeypatch.setattr(disk, "_allocate", lambda file, size: (files.append(file), real(file, size)))
    reserve = Reserve(tmp_path)
    reserve.hold(3 * MB)
    facts = os.fstat(files[0].fileno())
    assert facts.st_size == 3 * MB and facts.st_blocks * 512 >= 3 * MB and facts.st_dev == tmp_path.stat().st_dev
    assert list(tmp_path.iterdir()) == []  # a kill leaves nothing behind
    reserve.hold(MB)
    assert files[0].closed and os.fstat(files[1].fileno()).st_size == MB
    reserve.release()
    reserve.release()
    assert files[1].closed


def test_where_no_room_can_be_held_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_allocate", fails_with(errno.EOPNOTSUPP))
    assert train(make_config(), TinyDenoiser(), make_data(), tmp_path).step == 12
    monkeypatch.setattr(disk, "_allocate", fails_with(errno.ENOSPC))
    with pytest.raises(DiskError, match="No space"):
        Reserve(tmp_path).hold(MB)


# -- a disk that others fill up ----------------------------------------------------------------------------------------


class SmallDisk:
    """A pretended file system of `size` bytes under `root`; `others` is what somebody else has on it."""

    def __init__(self, root: Path, size: int, patch: pytest.MonkeyPatch) -> None:
        self.root, self.size, self.others = root, size, 0
        self.held: list[tuple[IO[bytes], int]] = []
        self.can_hold = True
        self._fsync = os.fsync
        patch.setattr(os, "fsync", self._checked_fsync)
        patch.setattr(disk, "_allocate", self._allocate)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=max(self.free, 0)))

    @property
    def free(self) -> int:
        files = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        return self.size - self.others - files - sum(size for file, size in self.held if not file.closed)

    def fill(self) -> None:
        """Somebody else takes all that is free."""
        self.others += max(self.free, 0)

    def _checked_fsync(self, descriptor: int) -> None:
        if self.free < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)

    def _allocate(self, file: IO[bytes], size: int) -> None:
        if not self.can_hold:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if self.free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.held.append((file, size))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallDisk:
    (tmp_path / "disk").mkdir()
    return SmallDisk(tmp_path / "disk", 20 * MB, monkeypatch)


class Full(NoCallbacks):
    """Somebody else fills the disk after step `at`."""

    def __init__(self, small: SmallDisk, at: int) -> None:
        self.small, self.at = small, at

    def on_step(self, report: StepReport) -> None:
        if report.step == self.at:
            self.small.fill()


def large_config(**settings: Any) -> Any:
    """Checkpoints of a megabyte: little of what is reckoned for them is for headers."""
    return make_config(**LARGE, **settings)


LARGE_BYTES = saved_bytes(1024 * (4 + 16 + 6 + 16 + 16 + 4), 6, EmaTeacher(), AdamW())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    train(large_config(), TinyDenoiser(), make_data(), folder)
    return bytes_of(folder)


def test_filled_between_two_saves_no_step_is_lost(small: SmallDisk, whole: dict[str, bytes]) -> None:
    """The next save goes where room was held; then the run ends, for there is none for the one after."""
    folder = small.root / "run"
    with pytest.raises(DiskError, match=r"run could not be written: No space .* needed, .* free\); free up ") as caught:
        train(large_config(), TinyDenoiser(), make_data(), folder, Full(small, 4))
    assert str(caught.value).endswith("; the run resumes at step 6") and caught.value.is_full
    assert saved_steps(folder / "checkpoints") == [6, 3]
    small.others = 0
    train(large_config(), TinyDenoiser(), make_data(), folder)
    assert bytes_of(folder) == whole


@pytest.mark.parametrize("checkpoint_every", [3, 100])
def test_filled_before_the_last_save_the_run_ends_well(small: SmallDisk, checkpoint_every: int) -> None:
    folder = small.root / "run"
    config = large_config(checkpoint_every=checkpoint_every, probe_every=0)
    assert train(config, TinyDenoiser(), make_data(), folder, Full(small, 11)).step == 12
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 12


def test_filled_for_a_moment_costs_nothing(small: SmallDisk, whole: dict[str, bytes]) -> None:
    """With checkpoints that replace one another there is always room for the next."""
    folder = small.root / "run"
    config = large_config(keep_checkpoints=1)
    train(config, TinyDenoiser(), make_data(), folder, Full(small, 4))
    assert {k: v for k, v in bytes_of(folder).items() if k != "header"} == {
        k: v for k, v in whole.items() if k != "header"
    }


def test_where_no_room_is_held_the_lora_is_saved_alone(small: SmallDisk) -> None:
    small.can_hold = False
    folder, config = small.root / "run", large_config(steps=5)

    class AlmostFull(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 5:
                small.others = small.free - 2 * LARGE_BYTES.lora

    with pytest.raises(DiskError, match=r"step-000005 could not be written: No space") as caught:
        train(config, TinyDenoiser(), make_data(), folder, AlmostFull())
    assert f"the run resumes at step 3, and the LoRA of step 5 is in {folder / 'lora.safetensors'}" in str(caught.value)
    tensors, metadata = load_lora(folder / "lora.safetensors")
    assert metadata["dopsd_step"] == "5" and all(tensor.isfinite().all() for tensor in tensors.values())
    small.others = 0
    assert train(config, TinyDenoiser(), make_data(), folder).step == 5
    assert load_lora(folder / "lora.safetensors")[0].keys() == tensors.keys()


def test_where_nothing_fits_what_was_there_stays(small: SmallDisk) -> None:
    small.can_hold = False
    folder, config = small.root / "run", large_config(steps=9)
    train(large_config(steps=4), TinyDenoiser(), make_data(), folder)
    before = bytes_of(folder)
    with pytest.raises(DiskError, match="could not be written: No space .*; the run resumes at step 4$"):
        train(config, TinyDenoiser(), make_data(), folder, Full(small, 5))
    assert bytes_of(folder) == before


def test_without_any_save_it_is_said_that_nothing_is_kept(small: SmallDisk) -> None:
    small.can_hold = False
    with pytest.raises(DiskError, match="; no step is saved$"):
        train(large_config(), TinyDenoiser(), make_data(), small.root / "run", Full(small, 1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_on_a_full_disk_saves_where_room_was_held(small: SmallDisk, error: type[BaseException]) -> None:
    class Interrupt(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 5:
                small.fill()
                raise error

    with pytest.raises(error):
        train(large_config(), TinyDenoiser(), make_data(), small.root / "run", Interrupt())
    assert saved_steps(small.root / "run" / "checkpoints") == [5, 3]
    assert load_lora(small.root / "run" / "lora.safetensors")[1]["dopsd_step"] == "5"


def test_the_error_of_a_run_is_not_hidden_by_a_full_disk(small: SmallDisk) -> None:
    small.can_hold = False
    denoiser = TinyDenoiser()

    class Both(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 4:
                small.fill()
                denoiser.poison_at = denoiser.calls + 1

    with pytest.raises(NonFiniteError, match="the loss of step 5 is nan"):
        train(large_config(probe_every=0), denoiser, make_data(), small.root / "run", Both())


def test_previews_of_the_host_are_part_of_the_need(small: SmallDisk) -> None:
    with pytest.raises(DiskError, match="run needs .*previews"):
        train(large_config(), TinyDenoiser(), make_data(), small.root / "run", host_bytes=20 * MB)


def test_the_last_step_is_saved_before_its_preview(tmp_path: Path) -> None:
    class Broken(NoCallbacks):
        def on_preview(self, step: int, adapters: Trainable) -> None:
            if step == 12:
                assert saved_steps(tmp_path / "checkpoints")[0] == 12
                assert load_lora(tmp_path / "lora.safetensors")[1]["dopsd_step"] == "12"
                raise RuntimeError("the decoder failed")

    with pytest.raises(RuntimeError, match="decoder"):
        train(large_config(checkpoint_every=100, preview_every=50), TinyDenoiser(), make_data(), tmp_path, Broken())


# -- a real one --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where the tests may mount one."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def test_on_a_real_full_file_system(tmpfs: Path) -> None:
    folder, config = tmpfs / "run", make_config(probe_every=0)

    class Fill(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 4:
                with contextlib.suppress(OSError), (tmpfs / "others").open("ab", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass

    with pytest.raises(
        DiskError, match="No space left on device .* free up some space there; the run resumes at step [56]$"
    ):
        train(config, TinyDenoiser(), make_data(), folder, Fill())
    (tmpfs / "others").unlink()
    assert train(config, TinyDenoiser(), make_data(), folder).step == 12
    train(config, TinyDenoiser(), make_data(), tmpfs.parent / "whole")
    assert bytes_of(folder) == bytes_of(tmpfs.parent / "whole")
    with (tmpfs / "others").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(tmpfs).free - 2**16)
    with pytest.raises(DiskError, match=r"next needs [\d.]+ [kM]B .*, and \d+ kB are free"):
        train(config, TinyDenoiser(), make_data(), tmpfs / "next")


def test_on_a_real_read_only_file_system(tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    denoiser = TinyDenoiser()
    with pytest.raises(
        DiskError, match="run could not be written: Read-only file system; allow writing there, or choose"
    ):
        train(make_config(), denoiser, make_data(), tmpfs / "run")
    assert denoiser.calls == 0


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (4096, "4 kB"), (10**6, "1.0 MB"), (2_340_000, "2.3 MB"), (5 * 10**9, "5.0 GB")],
)
def test_sizes_are_shown_in_suitable_units(size: int, words: str) -> None:
    assert format_bytes(size) == words
