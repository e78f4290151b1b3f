"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .disk import explained, writing
from .lock import IS_WINDOWS, try_lock

_ATTEMPTS = 20


@explained
def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` has either the old or the new contents at any time, even after a power failure.

    Leftovers of a killed process that wrote the same file are removed.

    Raises:
        DiskError: the folder is not writable; an old file is untouched and no other file is left behind.
    """
    _remove_leftovers(path)
    for attempt in range(_ATTEMPTS):
        if _written(path, data, is_last=attempt == _ATTEMPTS - 1):
            break
        time.sleep(0.01)
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> bool:
    """Writes `data` like `write_atomic`, but only if there is nothing at `path`, not even a broken link.

    Returns:
        Whether it was written.

    Raises:
        DiskError: the folder is not writable; no file is left behind.
    """
    if os.path.lexists(path):
        return False
    _remove_leftovers(path)
    with writing(path, len(data)):
        file, temporary = _open_temporary(path)
        try:
            with file:
                _fill(file, data)
            is_new = _moved_where_nothing_is(temporary, path)
        finally:
            _discard(temporary)
    sync_folder(path.parent)
    return is_new


def _moved_where_nothing_is(temporary: Path, path: Path) -> bool:
    """Gives a file the name `path` unless something has it; in a file system without links, another program may come
    between the look and the rename."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # FAT, exFAT and some network folders have no links
        if os.path.lexists(path):
            return False
        os.rename(temporary, path)
    return True


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill inside the `with` block, which then takes the place of `folder`.

    After an exception the new one is removed and the old one is untouched. A power failure while the two are exchanged
    may leave neither under its name.

    Raises:
        OSError: the folder beside it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.new")
    old = new.with_suffix(".old")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def _written(path: Path, data: bytes, *, is_last: bool) -> bool:
    """Writes a temporary file and renames it; False where another writer looked at it between the two (Windows)."""
    file, temporary = _open_temporary(path)
    try:
        with file:
            _fill(file, data)
            if not IS_WINDOWS:
                os.replace(temporary, path)  # while it is locked: nobody takes it for a leftover
        if IS_WINDOWS:  # where an open file cannot be renamed
            try:
                os.replace(temporary, path)
            except (FileNotFoundError, PermissionError):
                if is_last:
                    raise
                return _discard(temporary)
    except BaseException:
        _discard(temporary)
        raise
    return True


def _fill(file: IO[bytes], data: bytes) -> None:
    """Writes all of the data to the disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _discard(temporary: Path) -> bool:
    with contextlib.suppress(OSError):
        temporary.unlink()
    return False


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
                if is_dead and not IS_WINDOWS:
                    leftover.unlink()  # while it is locked: its writer could lock it the moment after
            if is_dead and IS_WINDOWS:
                leftover.unlink()  # an open file cannot be removed here, so not one that is being written either


def _stem(path: Path) -> str:
    return f".{path.name[:40]}."
