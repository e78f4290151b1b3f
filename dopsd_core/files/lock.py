"""A lock on a folder: two trainers in the same folder would remove each other's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


class FolderInUse(RuntimeError):
    """Raised if another process, or another run in this process, uses the folder."""


class FolderLock:
    """A lock from `acquire` until `release` or the end of the process, even by a kill; there is nothing to clean up.

    It has no effect on file systems without locks (some network drives).
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Acquires the lock.

        Raises:
            FolderInUse: another run holds it.
        """
        file = self._path.open("ab")
        if try_lock(file) is False:
            file.close()
            raise FolderInUse(
                f"another run is using {self._path.parent}; wait for it, stop it, or choose another folder"
            )
        self._file = file

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
