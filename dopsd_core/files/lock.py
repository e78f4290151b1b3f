"""Locks: two trainers in the same folder would remove each other's checkpoints, two savers take the same number."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

IS_WINDOWS = os.name == "nt"


class FolderInUse(RuntimeError):
    """Raised if another process, or another run in this process, uses the folder."""


class FolderLock:
    """A lock from `acquire` until `release` or the end of the process, even by a kill; there is nothing to clean up.

    It has no effect on file systems without locks (some network drives).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Acquires the lock.

        Raises:
            FolderInUse: another run holds it.
        """
        file = self.path.open("ab")
        if try_lock(file) is False:
            file.close()
            raise FolderInUse(
                f"another run is using {self.path.parent}; wait for it, stop it, or choose another folder"
            )
        self._file = file

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def one_at_a_time(path: Path, seconds: float = 120.0) -> Iterator[None]:
    """Inside the `with` block, no other process or thread is in such a block with this lock file; waits for them.

    It has no effect on file systems without locks.

    Args:
        path: the lock file; it stays.
        seconds: how long to wait.

    Raises:
        FolderInUse: another one did not finish in that time.
    """
    deadline = time.monotonic() + seconds
    with path.open("ab") as file:
        while try_lock(file) is False:
            if time.monotonic() > deadline:
                raise FolderInUse(f"another process is writing into {path.parent}; wait for it, or stop it")
            time.sleep(0.02)
        yield


def try_lock(file: IO[bytes]) -> bool | None:
    """Locks an open file until it is closed; False if it is locked already, None if locks are not supported."""
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system knows none
        return None
    return True


def _lock(file: IO[bytes]) -> None:
    if IS_WINDOWS:
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
