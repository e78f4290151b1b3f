"""Folders and JSONL files as a source: their images are files already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..dataset import read_entries
from ..folder import Entry
from ..masks import masks_beside
from ..problems import Problem, Problems
from .base import Chunk, digest_of, file_facts


class FileSource:
    """A folder or JSONL file; each part is one chunk of `size` images.

    Raises:
        ValueError: there are no images.
    """

    def __init__(self, place: Path, size: int, root: Path | None = None) -> None:
        self._place, self._size = place, size
        self._root = root if root is not None else (place if place.is_dir() else place.parent)
        problems = Problems()
        self._entries = read_entries(place, problems)
        self._problems = tuple(problems.found)
        self.digest = digest_of([[entry.image.name, *entry.captions] for entry in self._entries], size)
        if not self._entries and not any(problem.severity == "error" for problem in self._problems):
            raise ValueError(f"{place} has no images: give a folder of images with captions, a .jsonl, or .tar files")

    @property
    def title(self) -> str:
        """The path."""
        return str(self._place)

    @property
    def has_edits(self) -> bool:
        """Whether its images have sources."""
        return any(entry.source_images for entry in self._entries)

    @property
    def root(self) -> Path | None:
        """The folder that must contain all images."""
        return self._root

    @property
    def problems(self) -> Sequence[Problem]:
        """Of names and captions."""
        return self._problems

    def known_captions(self) -> Iterator[tuple[str, str]]:
        """(caption, trigger of its concept or "") of all images."""
        return ((caption, entry.trigger) for entry in self._entries for caption in entry.captions)

    @property
    def parts(self) -> int:
        """Number of chunks."""
        return -(-len(self._entries) // self._size)

    def count(self, parts: Sequence[int]) -> int | None:
        """Number of images in these parts."""
        return sum(len(self._part(part)) for part in parts)

    def chunks(self, part: int) -> Iterator[Chunk]:
        """The only chunk of the part."""
        entries = self._part(part)
        yield Chunk(0, True, len(entries), digest_of(list(map(_facts, entries))), lambda folder, problems: entries)

    def _part(self, part: int) -> list[Entry]:
        return self._entries[part * self._size : (part + 1) * self._size]


def _facts(entry: Entry) -> list[object]:
    """What an image is encoded from, without reading it."""
    files = [entry.image, *entry.source_images, *masks_beside(entry.image)]
    return [entry.captions, entry.repeats, [file_facts(file) for file in files]]
