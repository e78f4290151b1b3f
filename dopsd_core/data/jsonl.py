"""The rows of a JSONL as entries, under the authors' keys: a picture in each, or an edit in each.

{"local_path_list": ["a.png"], "h*w": "832*1264", "short_en": "a [V] dog", "detailed_zh": "..."}
{"ref_img": ["before.png"], "target_img": "after.png", "user_prompt_en": "make it winter"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .captions import CAPTION_KEYS, CaptionError, decode_utf8, row_captions
from .folder import Entry, Problems

PATH_KEYS = ("local_path_list", "local_paths", "image_path_list", "image_paths", "image_path", "path", "file_name")
"""Keys of a row for its picture, the first present one counts; the first path of a list is used."""

SOURCE_KEY, TARGET_KEY = "ref_img", "target_img"
"""Keys of an edit: the picture or pictures that it starts from, all used and in order, and its result."""

_NAMED_ROWS = 8


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
    _refuse_mixture(file, entries, problems)
    return entries


def _refuse_mixture(file: Path, entries: Sequence[Entry], problems: Problems) -> None:
    """Edits and plain pictures are trained under different teachers."""
    kinds = {"edits": [entry.line for entry in entries if entry.sources]}
    kinds["plain pictures"] = [entry.line for entry in entries if not entry.sources]
    (kind, few), (other, many) = sorted(kinds.items(), key=lambda item: len(item[1]))
    if few:
        rest = len(few) - _NAMED_ROWS
        rows = ", ".join(map(str, few[:_NAMED_ROWS])) + f" and {rest} more" * (rest > 0)
        told = f"rows {rows} are" if len(few) > 1 else f"row {rows} is"
        problems.error(
            file, few[0], f"{told} of {kind}, the other {len(many)} of {other}: put each kind into a file of its own"
        )


def _row_entry(file: Path, number: int, row: Mapping[str, object], problems: Problems) -> Entry | None:
    captions, complaints = row_captions(row)
    for complaint in complaints:
        problems.add("warning" if captions else "error", file, number, complaint)
    if not captions and not complaints:
        problems.error(file, number, f"no caption: give at least one of {', '.join(CAPTION_KEYS)}")
    pictures = _row_pictures(file, number, row, problems)
    if pictures is None:
        return None
    image, sources = pictures
    repeats = row.get("repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        problems.error(file, number, f"'repeats' is {repeats!r}, it must be a whole number from 1 on")
        repeats = 1
    declared = _row_size(file, number, row, -1 if sources else 0, problems)
    return Entry(image, tuple(captions.values()), file, number, repeats, declared, sources)


def _row_pictures(
    file: Path, number: int, row: Mapping[str, object], problems: Problems
) -> tuple[Path, tuple[Path, ...]] | None:
    """The picture that a row trains, and the sources of an edit."""
    given = [key for key in (SOURCE_KEY, TARGET_KEY) if row.get(key) is not None]
    plain = next((key for key in PATH_KEYS if row.get(key) is not None), None)
    if not given and plain is None:
        problems.error(
            file, number, f"no picture: give one of {', '.join(PATH_KEYS)}; or {SOURCE_KEY} and {TARGET_KEY} of an edit"
        )
        return None
    if not given and plain is not None:
        paths = _row_paths(file, number, plain, row[plain], problems)
        if len(paths) > 1:
            problems.warning(file, number, f"{plain!r} has {len(paths)} paths: only the first is used")
        return (paths[0], ()) if paths else None
    if len(given) == 1:
        lacking = TARGET_KEY if given == [SOURCE_KEY] else SOURCE_KEY
        problems.error(file, number, f"has {given[0]!r} and no {lacking!r}: an edit needs both")
        return None
    sources, targets = (_row_paths(file, number, key, row[key], problems) for key in given)
    if len(targets) > 1:
        problems.error(file, number, f"{TARGET_KEY!r} has {len(targets)} paths: an edit has one result")
    if plain is not None:
        problems.warning(
            file, number, f"{plain!r} is not read: {SOURCE_KEY!r} and {TARGET_KEY!r} make this row an edit"
        )
    return (targets[0], sources) if sources and len(targets) == 1 else None


def _row_paths(file: Path, number: int, key: str, value: object, problems: Problems) -> tuple[Path, ...]:
    """The path or paths under a key; none where they are no such thing."""
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        problems.error(file, number, f"{key!r} is {value!r}, it must be a path or a list of paths")
        return ()
    return tuple(file.parent / str(path) for path in paths)


def _row_size(
    file: Path, number: int, row: Mapping[str, object], place: int, problems: Problems
) -> tuple[int, int] | None:
    """The (width, height) that a row states as "h*w" or "w*h", for comparison with the file's own; in a list of sizes
    the one at `place`: the first of plain pictures, the last of an edit, whose target follows its sources."""
    for key in ("h*w", "w*h"):
        value = row.get(key)
        if isinstance(value, list) and value:
            value = value[place]
        if value is None:
            continue
        numbers = re.fullmatch(r"\s*(\d+)\s*[*x]\s*(\d+)\s*", value) if isinstance(value, str) else None
        if numbers is None:
            problems.warning(file, number, f"{key!r} is {value!r}, not like '832*1264': the file's own size counts")
            continue
        first, second = int(numbers[1]), int(numbers[2])
        return (second, first) if key == "h*w" else (first, second)
    return None
