"""Reads a JSONL file with one image or edit per row, under the authors' keys or those of other trainers.

{"local_path_list": ["a.png"], "h*w": "832*1264", "short_en": "a [V] dog", "detailed_zh": "..."}
{"ref_img": ["before.png"], "target_img": "after.png", "user_prompt_en": "make it winter"}
{"image_path": "after.png", "control_path_0": "before.png", "caption": "make it winter", "num_repeats": 2}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from .captions import CAPTION_KEYS, CaptionError, caption_keys, check_text, decode_utf8, row_captions
from .folder import UNREAD_SUFFIXES, Entry
from .images import SUFFIXES
from .problems import Problems
from .repeats import MAX_REPEATS
from .triggers import TRIGGER_KEY, checked_trigger

PATH_KEYS = (
    "local_path_list",
    "local_paths",
    "image_path_list",
    "image_paths",
    "image_path",
    "path",
    "file_name",
    "image",
)
"""Keys for the image of a row. The first key that is present is used, and the first path of a list."""

SOURCE_KEY, TARGET_KEY = "ref_img", "target_img"
"""The authors' keys of an edit: its source image or images, all used in order, and its target."""

_IMAGE, _FILE = r"_?(?:img|image)s?(?:_?(?:path|file|file_?name)s?)?(?:_?list)?", r"_file_?names?"

_SOURCE = re.compile(
    rf"((?:ref|reference|control|conditioning|source|src|input|original|before|edit|kontext){_IMAGE}"
    rf"|control_paths?|(?:input|source|control|reference){_FILE}|source|source_path|input|input_path|control|before)"
    r"(?:_?([0-9]{1,9}))?"
)
"""Keys for source images in the datasets of other trainers, optionally numbered: control_path_0."""

_TARGET = re.compile(
    rf"(?:target|output|edited|after|result){_IMAGE}|(?:target|output|edited){_FILE}"
    r"|target|target_path|output|output_path|after"
)
"""Keys for the target image."""

_WORDS = frozenset(
    (
        "source", "source_path", "input", "input_path", "control", "before",
        "target", "target_path", "output", "output_path", "after",
    )
)  # fmt: skip
"""Ambiguous ones of these keys, such as the origin of an image: read only if the value is the path of an image."""

_REPEATS_KEYS = ("repeats", "num_repeats")
_SIZE_KEYS = ("h*w", "w*h")
_SILENT_KEYS = frozenset((*_SIZE_KEYS, "class_name"))
"""Keys of the authors that are ignored without a warning."""

_URL = re.compile(r"(?i)(?:[a-z][a-z0-9+.-]+://|data:)")
_LINE_END = re.compile(r"\r\n|\r|\n")
_NAMED_ROWS = 8
_NAMED_KEYS = 12
_LONGEST_VALUE = 80


def read_jsonl(file: Path, problems: Problems) -> list[Entry]:
    """The rows of a JSONL file; paths are relative to its folder. Empty lines are skipped."""
    try:
        text = decode_utf8(file.read_bytes())
    except (OSError, CaptionError) as error:
        problems.error(file, getattr(error, "line", None), str(error))
        return []
    if _is_json_file(text):
        message = "a JSON file, not a JSONL: write one object per line, without [ ] around them and commas between them"
        problems.error(file, None, message)
        return []
    entries: list[Entry] = []
    unread: dict[str, None] = {}
    for number, line in enumerate(_LINE_END.split(text), 1):
        line = line.strip().strip("\ufeff").strip()
        if not line:
            continue
        try:
            row = _Row(file, number, _parsed(line), problems)
        except ValueError as error:
            problems.error(file, number, str(error))
            continue
        entry = row.entry()
        unread |= dict.fromkeys(row.unread())
        if entry is not None:
            entries.append(entry)
    _name_unread(file, list(unread), problems)
    _refuse_mixture(file, entries, problems)
    return entries


def _is_json_file(text: str) -> bool:
    """Whether this is one JSON value over several lines, or a list of rows."""
    start = text.lstrip()
    if not start.startswith("[") and _LINE_END.split(start, maxsplit=1)[0].strip() != "{":
        return False
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _parsed(line: str) -> Mapping[str, object]:
    """The object of a line.

    Raises:
        ValueError: with a sentence on what it is instead.
    """
    if "\0" in line:
        check_text(line)
    try:
        row = json.loads(line, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        hint = "; a JSONL has no commas between its rows" if line.endswith(",") else ""
        raise ValueError(f"not a JSON row: {error}{hint}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, this one is {type(row).__name__}")
    return row


def _without_repetition(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_shown(twice)} is there twice; keep one")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _name_unread(file: Path, keys: Sequence[str], problems: Problems) -> None:
    """Warns once of the non-empty keys that are not read."""
    if keys:
        rest = len(keys) - _NAMED_KEYS
        names = ", ".join(_shown(key) for key in keys[:_NAMED_KEYS]) + f" and {rest} more" * (rest > 0)
        problems.warning(
            file, None, f"the keys {names} are not read" if len(keys) > 1 else f"the key {names} is not read"
        )


def _refuse_mixture(file: Path, entries: Sequence[Entry], problems: Problems) -> None:
    """Reports a mixture of edits and plain images, which need different teachers."""
    kinds = {"edits": [entry.caption_line for entry in entries if entry.source_images]}
    kinds["plain images"] = [entry.caption_line for entry in entries if not entry.source_images]
    (kind, few), (other, many) = sorted(kinds.items(), key=lambda item: len(item[1]))
    if few:
        rest = len(few) - _NAMED_ROWS
        rows = ", ".join(map(str, few[:_NAMED_ROWS])) + f" and {rest} more" * (rest > 0)
        message = f"rows {rows} are" if len(few) > 1 else f"row {rows} is"
        problems.error(
            file, few[0], f"{message} of {kind}, the other {len(many)} of {other}: use a separate file for each kind"
        )


@dataclass
class _Row:
    """A row being read; `read` contains the keys read so far."""

    file: Path
    number: int
    values: Mapping[str, object]
    problems: Problems
    read: set[str] = field(default_factory=set)

    def entry(self) -> Entry | None:
        """The entry of the row, or None after reporting why there is none."""
        captions = self._captions()
        images = self._images()
        repeats, trigger = self._repeats(), self._trigger()
        if images is None:
            return None
        image, sources = images
        declared = self._size(-1 if sources else 0)
        return Entry(image, captions, self.file, self.number, repeats, declared, sources, trigger=trigger)

    def unread(self) -> list[str]:
        """The non-empty keys that were not read, without the ignored ones."""
        given = [key for key in self.values if key not in self.read and key not in _SILENT_KEYS]
        return [key for key in given if self.values[key] not in (None, "", [], {})]

    def _error(self, message: str) -> None:
        self.problems.error(self.file, self.number, message)

    def _warning(self, message: str) -> None:
        self.problems.warning(self.file, self.number, message)

    def _captions(self) -> tuple[str, ...]:
        self.read.update(caption_keys(self.values))
        found = row_captions(self.values)
        for message in found.errors:
            self._error(message)
        for message in found.complaints:
            (self._warning if found.texts else self._error)(message)
        if not found.texts and not found.errors and not found.complaints:
            self._error(f"no caption: give at least one of {', '.join(CAPTION_KEYS)}")
        return tuple(found.texts.values())

    def _trigger(self) -> str:
        """The trigger of the row's concept; "" if it has none, or after reporting why it is not valid."""
        given = self.values.get(TRIGGER_KEY)
        self.read.add(TRIGGER_KEY)
        if given in (None, ""):
            return ""
        try:
            if not isinstance(given, str):
                raise CaptionError(f"is {_shown(given)}, it must be text")
            return checked_trigger(given)
        except CaptionError as error:
            self._error(f"{TRIGGER_KEY!r}: {error}")
            return ""

    # -- images ------------------------------------------------------------------------------------------------------

    def _images(self) -> tuple[Path, tuple[Path, ...]] | None:
        """(the image or target, the source images of an edit)."""
        source_keys, target_keys = self._source_keys(), self._keys_like(_TARGET)
        plain = next((key for key in PATH_KEYS if self.values.get(key) is not None), None)
        if not source_keys and not target_keys:
            return self._plain_image(plain)
        target = target_keys[0] if target_keys else plain
        self.read.update((*source_keys, *target_keys))
        if not source_keys or target is None:
            given, lacking = (target_keys, SOURCE_KEY) if target_keys else (source_keys, TARGET_KEY)
            self._error(f"has {given[0]!r} but no {lacking!r}: an edit needs both")
            return None
        if len(target_keys) > 1:
            self._error(f"has {' and '.join(map(repr, target_keys))}: an edit has one target")
        self.read.add(target)
        groups = [self._paths(key) for key in source_keys]
        targets = self._paths(target)
        if len(targets) > 1:
            self._error(f"{target!r} has {len(targets)} paths: an edit has one target")
        if not all(groups) or len(targets) != 1:
            return None
        return targets[0], tuple(path for group in groups for path in group)

    def _plain_image(self, key: str | None) -> tuple[Path, tuple[Path, ...]] | None:
        if key is None:
            self._error(f"no image: give one of {', '.join(PATH_KEYS)}; or {SOURCE_KEY} and {TARGET_KEY} of an edit")
            return None
        self.read.add(key)
        paths = self._paths(key)
        if len(paths) > 1:
            self._warning(
                f"{key!r} has {len(paths)} paths: only the first is used; of an edit give {SOURCE_KEY} and {TARGET_KEY}"
            )
        return (paths[0], ()) if paths else None

    def _source_keys(self) -> list[str]:
        """The keys for source images in the order of their numbers, an unnumbered one first; all of one name."""
        numbered: dict[str, list[tuple[int, str]]] = {}
        for key in self._keys_like(_SOURCE):
            match = _SOURCE.fullmatch(key)
            if match is not None:
                numbered.setdefault(match[1], []).append((int(match[2]) if match[2] else -1, key))
        if len(numbered) > 1:
            names = ", ".join(repr(keys[0][1]) for keys in numbered.values())
            self._error(f"has source images under several keys: {names}; keep one")
        return [key for keys in numbered.values() for _, key in sorted(keys)]

    def _keys_like(self, pattern: re.Pattern[str]) -> list[str]:
        given = [key for key, value in self.values.items() if value is not None and pattern.fullmatch(key)]
        return [key for key in given if key.rstrip("_0123456789") not in _WORDS or _is_image_path(self.values[key])]

    def _paths(self, key: str) -> tuple[Path, ...]:
        """The path or paths under a key; empty after reporting an invalid value."""
        value = self.values[key]
        given = value if isinstance(value, list) else [value]
        paths = [path for path in given if isinstance(path, str) and path.strip()]
        if not paths or len(paths) < len(given):
            self._error(f"{key!r} is {_shown(value)}, it must be a path or a list of paths")
            return ()
        urls = [path for path in paths if _URL.match(path)]
        if urls:
            self._error(f"{key!r} is the URL {_shown(urls[0])}: download it and give the path of the file")
            return ()
        return tuple(self.file.parent / path for path in paths)

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _repeats(self) -> int:
        given = {key: self.values[key] for key in _REPEATS_KEYS if self.values.get(key) is not None}
        self.read.update(given)
        for key, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_REPEATS:
                self._error(f"{key!r} is {_shown(value)}, it must be a whole number from 1 to {MAX_REPEATS}")
                return 1
        counts = [value for value in given.values() if isinstance(value, int)]
        if len(set(counts)) > 1:
            self._error(f"{' and '.join(map(repr, given))} differ; keep one")
        return counts[0] if counts else 1

    def _size(self, place: int) -> tuple[int, int] | None:
        """The (width, height) that the row states as "h*w" or "w*h", to compare with the file's own; `place` is the
        index in a list of sizes: the first of a plain image, the last of an edit, whose target follows its sources."""
        for key in _SIZE_KEYS:
            value = self.values.get(key)
            if isinstance(value, list) and value:
                value = value[place]
            if value is None:
                continue
            numbers = (
                re.fullmatch(r"\s*([0-9]{1,9})\s*[*x]\s*([0-9]{1,9})\s*", value) if isinstance(value, str) else None
            )
            if numbers is None:
                self._warning(f"{key!r} is {_shown(value)}, not like '832*1264': using the file's size")
                continue
            first, second = int(numbers[1]), int(numbers[2])
            return (second, first) if key == "h*w" else (first, second)
        return None


def _is_image_path(value: object) -> bool:
    values: Iterable[object] = value if isinstance(value, list) else [value]
    endings = (*SUFFIXES, *UNREAD_SUFFIXES)
    return bool(value) and all(isinstance(path, str) and path.strip().lower().endswith(endings) for path in values)


def _shown(value: object) -> str:
    """A value for messages, shortened if it is long."""
    try:
        text = repr(value)
    except RecursionError:  # nested about as deep as a row can be
        return f"a nested {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
