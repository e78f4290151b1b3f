"""What `encode` needs of a source of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from ..folder import Entry
from ..problems import Problem, Problems


@dataclass(frozen=True, eq=False)
class Chunk:
    """The images of one shard, not yet read.

    Attributes:
        number: its index in its part.
        is_last: whether it is the last of its part.
        count: number of images.
        stamp: changes when an image or caption is changed.
        entries: the images with captions; writes into the given empty folder those that are no files, and reports
            what cannot be used.
    """

    number: int
    is_last: bool
    count: int
    stamp: str
    entries: Callable[[Path, Problems], Sequence[Entry]]


class Source(Protocol):
    """Images with captions in a fixed order, in parts that are read independently.

    Chunks do not depend on the number of processes, which share the parts.
    """

    @property
    def title(self) -> str:
        """What the user calls it."""
        ...

    @property
    def digest(self) -> str:
        """Changes with its parts; equal in all processes that see the same source."""
        ...

    @property
    def has_edits(self) -> bool:
        """Whether its images are edits."""
        ...

    @property
    def root(self) -> Path | None:
        """The folder that must contain all images; None if they are unpacked."""
        ...

    @property
    def problems(self) -> Sequence[Problem]:
        """Problems that were found by listing it."""
        ...

    def known_captions(self) -> Iterator[tuple[str, str]]:
        """(caption, trigger of its concept or "") of all images; none if they are not known before they are read."""
        ...

    @property
    def parts(self) -> int:
        """Number of parts."""
        ...

    def count(self, parts: Sequence[int]) -> int | None:
        """Number of images in these parts; None if it is not known before they are read."""
        ...

    def chunks(self, part: int) -> Iterator[Chunk]:
        """The chunks of a part in order, at least one.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        ...


@dataclass(frozen=True)
class Columns:
    """Which part of a Hugging Face dataset is read, and which columns.

    Attributes:
        split: the split.
        subset: the configuration; "" for the only one.
        revision: branch, tag or commit on the hub; "" for the newest.
        image_column: the image; "" for the only column with images.
        caption_column: the caption; "" for the columns that a JSONL row may have.
    """

    split: str = "train"
    subset: str = ""
    revision: str = ""
    image_column: str = ""
    caption_column: str = ""

    def options(self) -> list[str]:
        """The options on the command line that are not at their default."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return [f"--{name.replace('_', '-')}" for name in changed] or ["--split"]


def digest_of(*facts: object) -> str:
    """A digest of JSON-serializable facts, in hex."""
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()


def file_facts(path: Path) -> tuple[str, int, int]:
    """(name, size, time of the last change in ns) of a file; the latter are 0 if it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return path.name, 0, 0
    return path.name, found.st_size, found.st_mtime_ns
