"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from pathlib import Path
from typing import IO

from .disk import explained
from .lock import try_lock


@explained
def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` has either the old or the new contents at any time, even after a power failure.

    Leftovers of a killed process that wrote the same file are removed.

    Raises:
        DiskError: the folder is not writable; an old file is untouched and no other file is left behind.
    """
    _remove_leftovers(path)
    file, temporary = _open_temporary(path)
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable; does nothing if the system does not support it (Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open_temporary(path: Path) -> tuple[IO[bytes], Path]:
    """A new file next to `path`, locked while it is open, so that it is not treated as a leftover."""
    while True:
        # Not tempfile: its files are readable by their owner only, also after the rename.
        temporary = path.parent / f"{_stem(path)}{secrets.token_hex(8)}.tmp"
        file = temporary.open("xb")
        if try_lock(file) is not False and temporary.exists():
            return file, temporary
        file.close()  # another process removed it as a leftover before it was locked


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files for `path` whose writer is dead; none if the file system has no locks."""
    for leftover in path.parent.glob(f"{glob.escape(_stem(path))}{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(OSError):
            with leftover.open("ab") as file:
                is_dead = try_lock(file)
                if is_dead and os.name != "nt":
                    leftover.unlink()  # while it is locked: its writer could lock it right after
            if is_dead and os.name == "nt":
                leftover.unlink()  # an open file cannot be removed here, so not one that is being written either


def _stem(path: Path) -> str:
    return f".{path.name[:40]}."
