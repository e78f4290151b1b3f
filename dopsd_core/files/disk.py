"""Disk space of a run: checked before the first step and reserved for the last save; errors say what to do."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger("dopsd")

_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_MB = 10**6


class DiskError(OSError):
    """Raised if a file or folder could not be written; the message names it, the reason, and what to do.

    Attributes:
        is_full: whether the disk or the quota is full.
    """

    def __init__(self, message: str, is_full: bool = False) -> None:
        super().__init__(message)
        self.is_full = is_full

    def __reduce__(self) -> tuple[type[DiskError], tuple[str, bool]]:
        return DiskError, (str(self), self.is_full)  # so that it can be pickled by a worker process


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Inside the `with` block, converts errors of the system while writing `size` bytes to `path` to `DiskError`."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise _disk_error(error, path, size) from error


def explained(write: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
    """Decorates a function so that its errors are converted by `writing`."""

    @functools.wraps(write)
    def explaining(path: Path, data: bytes) -> None:
        with writing(path, len(data)):
            write(path, data)

    return explaining


def free_bytes(path: Path) -> int | None:
    """Free bytes for this user on the file system of `path`, which need not exist; None if unknown."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def require_room(folder: Path, size: int) -> None:
    """Checks that `size` more bytes fit on the file system of `folder`.

    Raises:
        DiskError: there is not enough space.
    """
    free = free_bytes(folder)
    if free is not None and free < size:
        raise DiskError(
            f"{folder} needs {format_bytes(size)} for checkpoints, previews and the LoRA, and {format_bytes(free)} are "
            f"free there: free up {format_bytes(size - free)}, or choose another output folder, a lower rank, or fewer "
            "checkpoints and previews",
            is_full=True,
        )


def require_writable(folder: Path) -> None:
    """Checks that `folder` is writable or can be created; leaves nothing behind.

    Raises:
        DiskError: it is not.
    """
    place = _existing(folder)
    with writing(folder), tempfile.TemporaryDirectory(dir=place) as trial, tempfile.TemporaryFile(dir=trial):
        pass


class Reserve:
    """Reserved disk space, so that the last save succeeds even if other programs fill the disk.

    It is an unnamed file, so a kill leaves nothing behind. It has no effect on file systems without preallocation.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def hold(self, size: int) -> None:
        """Reserves `size` bytes, replacing the previous reservation.

        Raises:
            DiskError: the disk or the quota has not enough space.
        """
        self.release()
        try:
            with ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
                _allocate(file, size)
                stack.pop_all()
                self._file = file
        except OSError as error:
            if error.errno in _FULL:
                raise _disk_error(error, self._folder, size) from error
            log.debug("no space is reserved in %s: %s", self._folder, error)

    def release(self) -> None:
        """Releases the reservation; does nothing if there is none."""
        if self._file is not None:
            self._file.close()
            self._file = None


def format_bytes(size: int) -> str:
    """A size for messages: "850 kB", "12.3 MB", "4.5 GB"."""
    if size < _MB:
        return f"{size / 1000:.0f} kB" if size >= 1000 else f"{size} bytes"
    return f"{size / 10**9:.1f} GB" if size >= 10**9 else f"{size / _MB:.1f} MB"


def _existing(path: Path) -> Path:
    """`path`, or its nearest parent folder that exists."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), path)


def _allocate(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)  # Windows allocates here; other systems may not


def _disk_error(error: OSError, path: Path, size: int) -> DiskError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = "check the disk and the folder"
    if error.errno in _FULL:
        free = free_bytes(path)
        needed = f"{format_bytes(size)} needed, " if size else ""
        reason += f" ({needed}{'an unknown amount' if free is None else format_bytes(free)} free)"
        remedy = "free up some space there"
    elif error.errno in _NOT_WRITABLE:
        remedy = "allow writing there, or choose another output folder"
    return DiskError(f"{path} could not be written: {reason}; {remedy}", error.errno in _FULL)
