"""What a run does about the disk: room is checked before the first step, held for the last save, and errors say what
to do.
"""

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
    """A file or folder could not be written; one sentence names it, the reason, and what to do.

    Attributes:
        is_full: the disk, or the quota on it, has no room.
    """

    def __init__(self, message: str, is_full: bool = False) -> None:
        super().__init__(message)
        self.is_full = is_full

    def __reduce__(self) -> tuple[type[DiskError], tuple[str, bool]]:
        return DiskError, (str(self), self.is_full)  # so that it survives the way out of a worker process


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Inside the `with`, what the system says about writing `size` bytes to `path` becomes a `DiskError`."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise _disk_error(error, path, size) from error


def explained(write: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
    """The function, its calls inside `writing`."""

    @functools.wraps(write)
    def explaining(path: Path, data: bytes) -> None:
        with writing(path, len(data)):
            write(path, data)

    return explaining


def free_bytes(path: Path) -> int | None:
    """Room for this user on the file system that `path` is, or would be, on; None where the system cannot tell."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def require_room(folder: Path, size: int) -> None:
    """Checks that `size` more bytes fit on the file system of `folder`.

    Raises:
        DiskError: they do not.
    """
    free = free_bytes(folder)
    if free is not None and free < size:
        raise DiskError(
            f"{folder} needs {format_bytes(size)} for checkpoints, previews and the LoRA, and {format_bytes(free)} are "
            f"free there: free {format_bytes(size - free)}, or choose another output folder, a lower rank, or fewer "
            "checkpoints and previews",
            is_full=True,
        )


def require_writable(folder: Path) -> None:
    """Checks that files can be made in `folder`, or folders where it will be; leaves nothing behind.

    Raises:
        DiskError: they cannot.
    """
    place = _existing(folder)
    with writing(folder), tempfile.TemporaryDirectory(dir=place) as trial, tempfile.TemporaryFile(dir=trial):
        pass


class Reserve:
    """Room that is taken now, so that the last save finds it even on a disk that others have filled.

    A file without a name: nothing is left behind by a kill. On file systems that promise no room it holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def hold(self, size: int) -> None:
        """Takes `size` bytes, in place of what was held before.

        Raises:
            DiskError: the disk, or the quota on it, has not so many left.
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
            log.debug("no room is held in %s: %s", self._folder, error)

    def release(self) -> None:
        """Gives the room back; does nothing when none is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def format_bytes(size: int) -> str:
    """A size for messages: "850 kB", "12.3 MB", "4.5 GB"."""
    if size < _MB:
        return f"{size / 1000:.0f} kB" if size >= 1000 else f"{size} bytes"
    return f"{size / 10**9:.1f} GB" if size >= 10**9 else f"{size / _MB:.1f} MB"


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), path)


def _allocate(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)  # Windows allocates here; elsewhere it is a wish


def _disk_error(error: OSError, path: Path, size: int) -> DiskError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = "check the disk and the folder"
    if error.errno in _FULL:
        free = free_bytes(path)
        needed = f"{format_bytes(size)} needed, " if size else ""
        reason += f" ({needed}{'an unknown amount' if free is None else format_bytes(free)} free)"
        remedy = "free some space there"
    elif error.errno in _NOT_WRITABLE:
        remedy = "allow writing there, or choose another output folder"
    return DiskError(f"{path} could not be written: {reason}; {remedy}", error.errno in _FULL)
