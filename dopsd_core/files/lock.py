"""One process at a time in a folder: two trainers would remove each other's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

IS_WINDOWS = os.name == "nt"


class FolderInUse(RuntimeError):
    """Another process, or another run of this one, is working in the folder."""


class FolderLock:
    """Held from `acquire` to `release` or to the end of the process, a kill included; there is nothing to clean up.

    Where the file system knows no locks (some network drives) it holds nothing back.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            FolderInUse: somebody else holds it.
        """
        file = self._path.open("ab")
        if try_lock(file) is False:
            file.close()
            raise FolderInUse(
                f"another run is working in {self._path.parent}; wait for it, stop it, or choose another folder"
            )
        self._file = file

    def release(self) -> None:
        """Gives the lock back; does nothing when it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def try_lock(file: IO[bytes]) -> bool | None:
    """Locks an open file until it is closed: False where another holder has it, None where there are no locks."""
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
