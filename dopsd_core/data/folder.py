"""A data set's folder as entries that no picture has been opened for yet.

photos/a.png            a picture
photos/a.txt            its caption

edits/target/a.png      the result of an edit
edits/target/a.txt      its instruction
edits/source/a.jpg      the picture that it starts from; other files of the folder are told, not guessed at
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .captions import CaptionError, Kind, read_caption_file
from .images import SUFFIXES

UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg")

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """Something wrong at a place of the data set; an error forbids training, a warning does not."""

    severity: Severity
    file: Path
    line: int | None
    message: str

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return f"{self.severity}: {place}: {self.message}"


@dataclass
class Problems:
    """The problems found so far, in the order of the data."""

    found: list[Problem] = field(default_factory=list)

    def add(self, severity: Severity, file: Path, line: int | None, message: str) -> None:
        """Notes a problem."""
        self.found.append(Problem(severity, file, line, message))

    def error(self, file: Path, line: int | None, message: str) -> None:
        """Notes a problem that forbids training."""
        self.add("error", file, line, message)

    def warning(self, file: Path, line: int | None, message: str) -> None:
        """Notes a problem that training lives with."""
        self.add("warning", file, line, message)


@dataclass(frozen=True)
class Entry:
    """A picture with captions, as the data set says; `captions` is empty where a problem was noted instead.

    `line` is the line of a JSONL (None in a folder), `declared` the size that a row states, (width, height); `sources`
    are the pictures that an edit starts from, in order.
    """

    image: Path
    captions: tuple[str, ...]
    source: Path
    line: int | None = None
    repeats: int = 1
    declared: tuple[int, int] | None = None
    sources: tuple[Path, ...] = ()


def read_folder(folder: Path, problems: Problems) -> list[Entry]:
    """The pictures of a folder and its sub-folders by name, hidden ones left out, with the captions beside them.

    A folder with the sub-folders source/ and target/ holds edits, of these two alone.
    """
    files = _walk(folder, problems)
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    rows = [file.name for file in files if file.suffix.lower() == ".jsonl"]
    hint = f" (there is {rows[0]}: to read that one, give its path)" if rows else ""
    halves = edit_folders(folder)
    if halves is None:
        entries = [_folder_entry(folder, picture, captions, hint, problems) for picture in pictures]
    else:
        entries = _EditFolder(folder, *halves, captions, hint, problems).entries(pictures)
    stems = {picture.with_suffix("") for picture in pictures}
    for file in files:
        if file.suffix.lower() in UNREAD_SUFFIXES:
            problems.warning(file, None, f"not read: convert {file.suffix} files to PNG, JPEG, WebP or BMP")
            stems.add(file.with_suffix(""))
    for stem, file in captions.items():
        if stem not in stems and re.fullmatch(r"(?i)readme|licen[sc]e|classes|requirements", stem.name) is None:
            problems.warning(file, None, "a caption without a picture of its name")
    return entries


def edit_folders(folder: Path) -> tuple[Path, Path] | None:
    """The sub-folders source/ and target/ of a folder of edits, in any case of letters; None where one is missing."""
    try:
        found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    except OSError:
        return None
    return (found["source"], found["target"]) if {"source", "target"} <= found.keys() else None


@dataclass(frozen=True)
class _EditFolder:
    """Pairs what lies in target/ with what lies at the same place in source/, whatever its suffix."""

    folder: Path
    source: Path
    target: Path
    captions: Mapping[Path, Path]
    hint: str
    problems: Problems

    def entries(self, pictures: Sequence[Path]) -> list[Entry]:
        """An entry for each picture in target/; pictures that belong to none are noted."""
        starts: dict[Path, list[Path]] = {}
        targets = []
        for picture in pictures:
            if picture.is_relative_to(self.target):
                targets.append(picture)
            elif picture.is_relative_to(self.source):
                starts.setdefault(picture.with_suffix(""), []).append(picture)
            else:
                self.problems.error(picture, None, "lies beside source/ and target/: move it into one of them")
        entries = [self._entry(target, starts) for target in targets]
        self._note_sources(starts, {self._start(target) for target in targets})
        return entries

    def _entry(self, target: Path, starts: Mapping[Path, Sequence[Path]]) -> Entry:
        start = self._start(target)
        stray = self.captions.get(start)
        hint = f" (there is {stray.relative_to(self.folder)}: move it)" if stray is not None else self.hint
        entry = _folder_entry(self.folder, target, self.captions, hint, self.problems, "instruction")
        found = starts.get(start, ())
        if not found:
            place = f"{start.relative_to(self.folder)}{target.suffix}"
            self.problems.error(target, None, f"no source: put the picture that this edit starts from at {place}")
        elif stray is not None and entry.captions:
            self.problems.warning(stray, None, f"not read: the instruction is the one in {entry.source.parent.name}/")
        return replace(entry, sources=tuple(found), captions=entry.captions if len(found) == 1 else ())

    def _note_sources(self, starts: Mapping[Path, Sequence[Path]], wanted: set[Path]) -> None:
        for start, found in starts.items():
            if len(found) > 1:
                names = ", ".join(path.name for path in found)
                self.problems.error(found[0], None, f"{len(found)} sources of one name: {names}; keep one")
            if start not in wanted:
                place = self.target / start.relative_to(self.source)
                told = f"a source without a target: its edit's result is missing at {place.relative_to(self.folder)}.*"
                self.problems.warning(found[0], None, told)

    def _start(self, target: Path) -> Path:
        """Where the source of a target lies, without its suffix."""
        return self.source / target.relative_to(self.target).with_suffix("")


def _walk(folder: Path, problems: Problems) -> list[Path]:
    """All files below a folder, sorted; linked folders outside of it are errors (those inside are met anyway)."""
    files: list[Path] = []
    root = folder.resolve()

    def unreadable(error: OSError) -> None:
        problems.error(Path(error.filename or folder), None, f"cannot be listed: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent)
        files += [here / name for name in sorted(names) if not name.startswith(".")]
        for name in folders:
            link = here / name
            if link.is_symlink() and not link.resolve().is_relative_to(root):
                problems.error(link, None, f"leaves the folder {root}: a link to {link.resolve()}; copy it there")
    return files


def _folder_entry(
    folder: Path,
    image: Path,
    captions: Mapping[Path, Path],
    hint: str,
    problems: Problems,
    kind: Kind = "caption",
) -> Entry:
    caption_file = captions.get(image.with_suffix(""))
    texts: tuple[str, ...] = ()
    if caption_file is None:
        problems.error(image, None, f"no {kind}: write it to {image.with_suffix('.txt').name} beside it{hint}")
    else:
        try:
            if not caption_file.resolve().is_relative_to(folder.resolve()):
                raise CaptionError(f"leaves the folder {folder}")
            texts = (read_caption_file(caption_file, kind),)
        except CaptionError as error:
            problems.error(caption_file, error.line or 1, str(error))
        except OSError as error:
            problems.error(caption_file, None, f"cannot be read: {error.strerror}")
    named = re.match(r"(\d+)_", image.parent.name) if image.parent != folder else None
    repeats = int(named[1]) if named else 1
    if repeats < 1:
        problems.error(image.parent, None, "the folder's name asks for 0 repeats; name it 1_... or rename it")
        repeats = 1
    return Entry(image, texts, caption_file or image, None, repeats)
