"""Small disks in memory that a measurement fills or makes read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotHere(RuntimeError):
    """This machine cannot play a scenario; the message says why."""


def fill(folder: Path) -> None:
    """Takes all room that is left on a folder's disk."""
    try:
        with (folder / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 1024)
    except OSError:
        pass


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A disk of its own at a folder, in memory.

    Raises:
        NotHere: this process may not mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        raise NotHere("not measured: mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    """Makes a mounted folder "ro" or "rw"."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def names_full_disk(error: str, folder: str) -> bool:
    """Whether an error says which folder has no room, as the system says it or as the check before a run does."""
    return folder in error and any(words in error for words in ("No space left", " are free there: free "))
