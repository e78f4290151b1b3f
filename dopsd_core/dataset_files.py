"""The two forms of a data set on disk, as entries that no picture has been opened for yet.

Folder: pictures with a .txt of the same name beside them. JSONL: a row per picture, the authors' keys,

    {"local_path_list": ["a.png"], "h*w": "832*1264", "short_en": "a [V] dog", "detailed_zh": "..."}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .captions import CAPTION_KEYS, CaptionError, decode_utf8, read_caption_file, row_captions
from .images import SUFFIXES

PATH_KEYS = ("local_path_list", "local_paths", "image_path_list", "image_paths", "image_path", "path", "file_name")
"""Keys of a row for its picture, the first present one counts; the first path of a list is used."""

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

    `line` is the line of a JSONL (None in a folder), `declared` the size that a row states, (width, height).
    """

    image: Path
    captions: tuple[str, ...]
    source: Path
    line: int | None = None
    repeats: int = 1
    declared: tuple[int, int] | None = None


def read_folder(folder: Path, problems: Problems) -> list[Entry]:
    """The pictures of a folder and its sub-folders by name, hidden ones left out, with the captions beside them."""
    files = _walk(folder, problems)
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    rows = [file.name for file in files if file.suffix.lower() == ".jsonl"]
    hint = f" (there is {rows[0]}: to read that one, give its path)" if rows else ""
    entries = [_folder_entry(folder, picture, captions, hint, problems) for picture in pictures]
    stems = {picture.with_suffix("") for picture in pictures}
    for file in files:
        if file.suffix.lower() in UNREAD_SUFFIXES:
            problems.warning(file, None, f"not read: convert {file.suffix} files to PNG, JPEG, WebP or BMP")
            stems.add(file.with_suffix(""))
    for stem, file in captions.items():
        if stem not in stems and re.fullmatch(r"(?i)readme|licen[sc]e|classes|requirements", stem.name) is None:
            problems.warning(file, None, "a caption without a picture of its name")
    return entries


def read_jsonl(file: Path, problems: Problems) -> list[Entry]:
    """The rows of a JSONL; paths are relative to its folder. Empty lines are skipped."""
    try:
        text = decode_utf8(file.read_bytes())
    except (OSError, CaptionError) as error:
        problems.error(file, getattr(error, "line", None), str(error))
        return []
    entries: list[Entry] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.error(file, number, f"not a JSON row: {error}")
            continue
        if not isinstance(row, dict):
            problems.error(file, number, f"a row must be a JSON object, this one is {type(row).__name__}")
            continue
        entry = _row_entry(file, number, row, problems)
        if entry is not None:
            entries.append(entry)
    return entries


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


def _folder_entry(folder: Path, image: Path, captions: Mapping[Path, Path], hint: str, problems: Problems) -> Entry:
    caption_file = captions.get(image.with_suffix(""))
    texts: tuple[str, ...] = ()
    if caption_file is None:
        problems.error(image, None, f"no caption: write it to {image.with_suffix('.txt').name} beside it{hint}")
    else:
        try:
            if not caption_file.resolve().is_relative_to(folder.resolve()):
                raise CaptionError(f"leaves the folder {folder}")
            texts = (read_caption_file(caption_file),)
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


def _row_entry(file: Path, number: int, row: Mapping[str, object], problems: Problems) -> Entry | None:
    captions, complaints = row_captions(row)
    for complaint in complaints:
        problems.add("warning" if captions else "error", file, number, complaint)
    if not captions and not complaints:
        problems.error(file, number, f"no caption: give at least one of {', '.join(CAPTION_KEYS)}")
    path = _row_path(file, number, row, problems)
    if path is None:
        return None
    repeats = row.get("repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        problems.error(file, number, f"'repeats' is {repeats!r}, it must be a whole number from 1 on")
        repeats = 1
    declared = _row_size(file, number, row, problems)
    return Entry(file.parent / path, tuple(captions.values()), file, number, repeats, declared)


def _row_path(file: Path, number: int, row: Mapping[str, object], problems: Problems) -> str | None:
    key = next((key for key in PATH_KEYS if row.get(key) is not None), None)
    if key is None:
        problems.error(file, number, f"no picture: give one of {', '.join(PATH_KEYS)}")
        return None
    value = row[key]
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        problems.error(file, number, f"{key!r} is {value!r}, it must be a path or a list of paths")
        return None
    if len(paths) > 1:
        problems.warning(file, number, f"{key!r} has {len(paths)} paths: only the first is used")
    return str(paths[0])


def _row_size(file: Path, number: int, row: Mapping[str, object], problems: Problems) -> tuple[int, int] | None:
    """The (width, height) that a row states as "h*w" or "w*h", for comparison with the file's own."""
    for key in ("h*w", "w*h"):
        value = row.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            continue
        numbers = re.fullmatch(r"\s*(\d+)\s*[*x]\s*(\d+)\s*", value) if isinstance(value, str) else None
        if numbers is None:
            problems.warning(file, number, f"{key!r} is {value!r}, not like '832*1264': the file's own size counts")
            continue
        first, second = int(numbers[1]), int(numbers[2])
        return (second, first) if key == "h*w" else (first, second)
    return None
