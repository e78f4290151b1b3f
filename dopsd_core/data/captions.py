"""Captions: where they stand in the data, and the trigger word that names the concept in them.

In the authors' data the concept is written `[V]`; a user may choose a word to train instead, the trigger.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

PLACEHOLDER = "[V]"
"""How the authors' captions write the concept."""

AUTHORS_KEYS = tuple(
    f"{kind}_{language}" for language in ("en", "zh") for kind in ("short", "medium", "detailed", "user_prompt")
)
"""Caption keys of a row in the authors' JSONL; one is drawn at random at each visit."""

CAPTION_KEYS = (*AUTHORS_KEYS, "caption", "prompt", "text")
"""All keys that are read as captions, the authors' and the common ones."""


class CaptionError(ValueError):
    """A caption that cannot be used; the message says why, without the file's name. `line` is set where known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


Kind = Literal["caption", "instruction"]
"""Of a text: an instruction says what an edit changes."""


def read_caption_file(path: Path, kind: Kind = "caption") -> str:
    """The text of a caption file, stripped.

    Raises:
        CaptionError: the file is empty, not UTF-8, or no ordinary file.
    """
    if not path.is_file():
        raise CaptionError("is no file")
    text = decode_utf8(path.read_bytes()).strip()
    if not text:
        wanted = "what the picture shows" if kind == "caption" else "what is to change"
        raise CaptionError(f"the {kind} is empty; write {wanted}")
    return text


def decode_utf8(data: bytes) -> str:
    """UTF-8 with or without byte-order mark.

    Raises:
        CaptionError: with the line of the first byte that is none.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CaptionError("the text is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CaptionError("the text is not UTF-8; save it as UTF-8", line) from error


def row_captions(row: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """The captions of a JSONL row by key, and what is wrong with others; equal texts under two keys count twice."""
    captions: dict[str, str] = {}
    complaints: list[str] = []
    for key in CAPTION_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            complaints.append(f"{key!r} is {type(value).__name__}, not text")
        elif not value.strip():
            complaints.append(f"{key!r} is an empty caption")
        else:
            captions[key] = value.strip()
    return captions, complaints


def put_trigger(caption: str, trigger: str) -> str:
    """`[V]` replaced by the trigger; with no trigger the caption stays as it is."""
    return caption.replace(PLACEHOLDER, trigger) if trigger else caption


def has_trigger(caption: str, trigger: str = "") -> bool:
    """Whether the caption names the concept, by `[V]` or by the trigger as a word of its own (any case)."""
    return bool(_concept(trigger).search(caption))


def remove_trigger(caption: str, trigger: str = "") -> str:
    """The caption without `[V]` and the trigger, spaces and commas tidied: "a sks dog, sks" becomes "a dog".

    What the prior anchor trains on: the ordinary words of the data set without the name of the concept.
    """
    text = _concept(trigger).sub(" ", caption)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
    return text.strip(" ,;:")


def _concept(trigger: str) -> re.Pattern[str]:
    """Matches `[V]` and the trigger. Only ASCII letters join a word: Chinese is written without spaces."""
    names = [re.escape(PLACEHOLDER)]
    if trigger.strip():
        words = r"\s+".join(re.escape(word) for word in trigger.split())
        names.append(rf"(?<![A-Za-z0-9_]){words}(?![A-Za-z0-9_])")
    return re.compile("|".join(names), re.IGNORECASE)
