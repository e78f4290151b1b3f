"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` holds the old contents or the new at any moment, a power cut included.

    Raises:
        OSError: the folder cannot be written; the old file, if any, is untouched and nothing else is left behind.
    """
    # Not tempfile: its files are readable by their owner alone, and stay so after the rename.
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
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
    """Makes a rename inside `folder` durable; where the system has no such thing (Windows), does nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
