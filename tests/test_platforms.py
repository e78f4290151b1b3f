"""What differs on Windows and macOS, simulated: locks, folders that cannot be synced, open files, encodings."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dopsd_core.files import atomic, lock
from dopsd_core.files.atomic import write_atomic
from dopsd_core.files.lock import FolderInUse, FolderLock, try_lock
from dopsd_core.training.trainer import train
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes

ROOT = Path(__file__).resolve().parents[1]
PROC = Path("/proc/self/fd")


class WindowsLocks:
    """msvcrt.locking over a table of files: a second handle on a locked file is refused."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def locking(self, descriptor: int, mode: int, size: int) -> None:
        assert (mode, size) == (self.LK_NBLCK, 1)
        inode = os.fstat(descriptor).st_ino
        holder = self.held.get(inode)
        if holder is not None and holder != descriptor and _is_open(holder, inode):
            raise PermissionError(13, "Permission denied")
        self.held[inode] = descriptor


def _is_open(descriptor: int, inode: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == inode
    except OSError:
        return False


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> WindowsLocks:
    """Locks as Windows has them; open files that can be neither renamed over nor removed; folders without fsync."""
    if not PROC.exists():
        pytest.skip("open files are read from /proc")
    locks = WindowsLocks()
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locks.locking, LK_NBLCK=locks.LK_NBLCK))
    monkeypatch.setattr(lock, "IS_WINDOWS", True)
    monkeypatch.setattr(atomic, "IS_WINDOWS", True)
    honest = {name: getattr(os, name) for name in ("replace", "open", "unlink")}

    def refuse_open(path: Any) -> None:
        if str(path) in _open_files():
            raise PermissionError(13, "The process cannot access the file because it is being used", str(path))

    def replace(source: Any, target: Any, **more: Any) -> None:
        refuse_open(source)
        refuse_open(target)
        honest["replace"](source, target, **more)

    def unlink(path: Any, **more: Any) -> None:
        if not Path(path).name.startswith("tmp"):  # tempfile's, which Windows itself removes when they are closed
            refuse_open(path)
        honest["unlink"](path, **more)

    def open_file(path: Any, *flags: Any, **more: Any) -> int:
        if Path(path).is_dir() and "dir_fd" not in more:  # shutil's, which it does not use on Windows
            raise PermissionError(13, "Permission denied", str(path))
        return honest["open"](path, *flags, **more)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "open", open_file)
    return locks


def _open_files() -> set[str]:
    found = set()
    for link in PROC.iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            found.add(os.readlink(link))
    return found


def test_the_simulation_refuses_what_windows_refuses(windows: WindowsLocks, tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file, pytest.raises(PermissionError):
        assert try_lock(file)
        os.replace(tmp_path / "a", tmp_path / "b")
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)


def test_a_folder_has_one_holder(windows: WindowsLocks, tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(FolderInUse):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_second_training_in_the_same_folder_is_refused(windows: WindowsLocks, tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(FolderInUse):
        train(make_config(steps=1), TinyDenoiser(), make_data(), tmp_path)
    first.release()
    assert train(make_config(steps=1), TinyDenoiser(), make_data(), tmp_path).step == 1


def test_files_are_replaced_and_leftovers_removed(windows: WindowsLocks, tmp_path: Path) -> None:
    leftover = tmp_path / ".x.0123456789abcdef.tmp"
    leftover.write_bytes(b"half")
    for data in (b"one", b"two"):
        write_atomic(tmp_path / "x", data)
        assert (tmp_path / "x").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_training_is_the_same_there(windows: WindowsLocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(steps=4, checkpoint_every=2)
    train(config, TinyDenoiser(), make_data(), tmp_path / "there")
    monkeypatch.undo()
    train(config, TinyDenoiser(), make_data(), tmp_path / "here")
    assert saved_bytes(tmp_path / "there") == saved_bytes(tmp_path / "here")


@pytest.mark.parametrize("is_windows", [False, True])
def test_many_writers_of_one_file(request: pytest.FixtureRequest, tmp_path: Path, is_windows: bool) -> None:
    """None takes another's temporary file for a leftover and fails."""
    if is_windows:
        request.getfixturevalue("windows")
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                write_atomic(tmp_path / "x", bytes([number]) * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set((tmp_path / "x").read_bytes())) == 1


@pytest.mark.long
def test_no_file_is_read_in_the_systems_encoding(tmp_path: Path) -> None:
    """Python warns of every open() that leaves the encoding to the system, which is not UTF-8 on Windows."""
    script = """
import sys
from pathlib import Path
from dopsd_core.__main__ import main
from dopsd_core.demo.concept import make_concept, write_dataset
write_dataset(make_concept(0), Path("data"))
for arguments in (["inspect-dataset", "data"], ["train", "data", "--output", "run", "--steps", "2", "--warmup", "0"]):
    sys.argv[1:] = arguments
    assert main() == 0
"""
    # whoever warns is a module of ours by its file's name: -W takes no pattern
    command = [sys.executable, "-X", "warn_default_encoding", "-c", script]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    warned = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and "dopsd_core" in line]
    assert warned == []


def without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text in the system's encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [value.value for value in node.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        is_text = isinstance(node.func, ast.Name) or any(re.fullmatch("[rwax+t]{1,3}", mode) for mode in modes)
        if name in ("read_text", "write_text") or name == "open" and is_text and not any("b" in mode for mode in modes):
            lines.append(node.lineno)
    return lines


def test_no_source_leaves_the_encoding_to_the_system() -> None:
    """The files that the run above does not read or write too."""
    files = [path for folder in ("dopsd_core", "nodes") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: lines for path in files if (lines := without_encoding(path.read_text(encoding="utf-8")))}
    assert found == {}
    calls = "p.read_text()\np.open('w')\nopen(p)\np.open('rb')\np.write_text(x, encoding='utf-8')\nrun.open(True)\n"
    assert without_encoding(calls) == [1, 2, 3]
