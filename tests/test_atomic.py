"""Files that are whole or not there."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dopsd_core.files.atomic import write_atomic
from dopsd_core.files.lock import FolderInUse, one_at_a_time

ROOT = Path(__file__).parent.parent
STUCK = """
import os, sys, time
from pathlib import Path
from dopsd_core.files.atomic import write_atomic
os.fsync = lambda descriptor: (print("writing", flush=True), time.sleep(60))
write_atomic(Path(sys.argv[1]), b"half")
"""


def stuck_writer(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `path`."""
    command = [sys.executable, "-c", STUCK, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "x"
    for data in (b"one", b"two"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "x", b"")
    (tmp_path / "y").write_bytes(b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_alone(tmp_path, monkeypatch, step):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_next_write_removes_what_a_killed_writer_left_and_nothing_of_a_live_one(tmp_path):
    path, other = tmp_path / "x.bin", tmp_path / "y.bin"
    writers = [stuck_writer(path), stuck_writer(path), stuck_writer(other)]
    try:
        os.kill(writers[0].pid, signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        writers[0].wait()
        assert len(list(tmp_path.glob(".x.bin.*.tmp"))) == 2
        write_atomic(path, b"whole")
        assert len(list(tmp_path.glob(".x.bin.*.tmp"))) == 1, "the live writer's file stays"
        assert len(list(tmp_path.glob(".y.bin.*.tmp"))) == 1, "another file's is not looked at"
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    write_atomic(path, b"again")
    assert path.read_bytes() == b"again" and not list(tmp_path.glob(".x.bin.*.tmp"))


def test_files_that_only_look_like_leftovers_stay(tmp_path):
    names = [".x.bin.tmp", ".x.bin.0123.tmp", "x.bin.0123456789abcdef.tmp", ".x.bin.0123456789abcdeg.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    write_atomic(tmp_path / "x.bin", b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, "x.bin"])


def test_a_name_with_wildcards_is_meant_as_it_is(tmp_path):
    (tmp_path / ".a.0123456789abcdef.tmp").write_bytes(b"of another file")
    write_atomic(tmp_path / "[ab]*", b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.0123456789abcdef.tmp", "[ab]*"]


def test_who_saves_at_the_same_time_waits_and_says_so_if_it_takes_too_long(tmp_path):
    lock, order = tmp_path / ".saving", []

    def second() -> None:
        with one_at_a_time(lock):
            order.append("second")

    with ThreadPoolExecutor(1) as thread:
        with one_at_a_time(lock):
            with pytest.raises(FolderInUse, match="another process is writing into"), one_at_a_time(lock, seconds=0.0):
                pass
            waiting = thread.submit(second)
            order.append("first")
        waiting.result()
    assert order == ["first", "second"]
