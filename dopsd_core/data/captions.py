"""Captions: reading them from files and JSONL rows, and the trigger word that names the concept.

In the authors' data the concept is written as `[V]`; users may choose another word, the trigger.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

PLACEHOLDER = "[V]"
"""The placeholder for the concept in the authors' captions; `[v]` is equivalent."""

AUTHORS_KEYS = tuple(
    f"{kind}_{language}" for language in ("en", "zh") for kind in ("short", "medium", "detailed", "user_prompt")
)
"""Caption keys of a row in the authors' JSONL; one caption is sampled per visit."""

INSTRUCTION_KEYS = ("instruction", "edit_instruction", "edit_prompt")
"""Keys for edit instructions in other datasets; read if a row has no other caption."""

CAPTION_KEYS = (*AUTHORS_KEYS, "caption", "prompt", "text")
"""All keys that are read as captions."""

MAX_BYTES = 1 << 20
"""Maximum size of a caption file in bytes; encoders read a few thousand."""

_LINE_END = re.compile(r"\r\n|\r|\n")
_NAMED = 4  # near misses in a sentence
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")

_UNSEEN = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf"))
"""Unicode's categories of spaces, line ends, control and format characters."""

_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters of Hangul and Braille that are drawn as spaces."""

_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class CaptionError(ValueError):
    """Raised for an invalid caption; the message gives the reason without the file name. `line` is set if known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


Kind = Literal["caption", "instruction"]
"""Kind of a text; an instruction describes an edit."""


# -- bytes and characters ----------------------------------------------------------------------------------------------


def read_caption_file(path: Path, kind: Kind = "caption") -> str:
    """Reads the text of a caption file, including surrounding whitespace.

    Raises:
        CaptionError: the file is empty, too large, not a regular file, not UTF-8, or contains invalid characters.
    """
    if not path.is_file():
        raise CaptionError("is not a file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CaptionError(f"has {size / 2**20:.0f} MB, too large for one {kind}")
    text = decode_utf8(path.read_bytes())
    check_text(text)
    if is_blank(text):
        wanted = "what the image shows" if kind == "caption" else "what is to change"
        raise CaptionError(f"the {kind} is empty; write {wanted}")
    return text


def decode_utf8(data: bytes) -> str:
    """Decodes UTF-8 with or without byte-order mark.

    Raises:
        CaptionError: the bytes have another encoding; gives the line of the first invalid byte.
    """
    for mark, name in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            raise CaptionError(f"the text is {name}; save it as UTF-8")
    wide = _wide_encoding(data)
    if wide is not None:
        raise CaptionError(f"the text is {wide} without byte-order mark; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CaptionError("the text is not UTF-8; save it as UTF-8", line) from error


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if the bytes contain NULs and clearly have that encoding; else None."""
    if b"\0" not in data:
        return None
    for width, name in ((4, "UTF-32"), (2, "UTF-16")):
        whole = data[: len(data) - len(data) % width]
        for order in ("le", "be"):
            try:
                text = whole.decode(f"{name}-{order}").rstrip("\0")
            except UnicodeDecodeError:
                continue
            explained = sum(character < "\u0100" for character in text)  # each of them has a NUL in UTF-16
            if text and _NO_TEXT.search(text) is None and (width == 4 or 2 * explained > whole.count(0)):
                return f"{name} ({order.upper()})"
    return None


def check_text(text: str) -> None:
    """Rejects invalid characters: NUL and other control characters, lone surrogates, stray byte-order marks.

    Raises:
        CaptionError: there is one; gives its line.
    """
    found = _NO_TEXT.search(text)
    if found is not None:
        raise CaptionError(_what_it_is(found.group()), _line_of(text, found.start()))


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen: spaces of any script, zero-width characters, fillers."""
    return all(character in _FILLERS or unicodedata.category(character) in _UNSEEN for character in text)


def _what_it_is(character: str) -> str:
    code = f"U+{ord(character):04X}"
    if character == "\0":
        return "the text contains NUL characters, as padding or text that is not UTF-8 does; save it as UTF-8"
    if "\ud800" <= character <= "\udfff":
        return f"the text contains half a character ({code}): it was cut or converted wrongly; write it again"
    if character == "\ufeff":
        return "the text contains a byte-order mark (U+FEFF) inside, as joined files do; remove it"
    return f"the text contains the control character {code}; remove it and save the text as UTF-8"


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowCaptions:
    """The captions of a JSONL row.

    Attributes:
        texts: captions by key; equal texts under two keys count twice.
        errors: problems with other captions that prevent training.
        complaints: problems with other captions that only matter if there is no valid caption.
    """

    texts: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def row_captions(row: Mapping[str, object]) -> RowCaptions:
    """The captions of a row under `CAPTION_KEYS`, or else under `INSTRUCTION_KEYS`."""
    found = RowCaptions()
    for key in caption_keys(row):
        value = row[key]
        if not isinstance(value, str):
            found.complaints.append(f"{key!r} is {type(value).__name__}, not text")
        elif is_blank(value):
            found.complaints.append(f"{key!r} is an empty caption")
        else:
            try:
                text = value.removeprefix("\ufeff")
                check_text(text)
                found.texts[key] = text.strip()
            except CaptionError as error:
                found.errors.append(f"{key!r}: {error}")
    return found


def caption_keys(row: Mapping[str, object]) -> list[str]:
    """The keys of a row that are read as captions."""
    given = [key for key in CAPTION_KEYS if row.get(key) is not None]
    return given or [key for key in INSTRUCTION_KEYS if row.get(key) is not None]


# -- the concept's name ------------------------------------------------------------------------------------------------

_PLACEHOLDER = r"(?<![\[\\])\[V\](?!\])"

_GAP = r"[\s\u200b-\u200f\u2060\ufeff]*"
_LETTER = r"[V\uff36\u2164]"  # full-width V, Roman numeral five
_OPEN, _CLOSE = r"[\[{<\uff3b\uff5b\uff1c\u3010\u3014\u3008\u300a]", r"[\]}>\uff3d\uff5d\uff1e\u3011\u3015\u3009\u300b]"
_NAME = rf"(?:{_LETTER}\*?|trigger(?:[\s_-]?(?:word|token|phrase))?|concept|subject|name|token)"

_NEAR_PLACEHOLDER = re.compile(
    rf"\\?{_OPEN}{{1,2}}{_GAP}\\?{_NAME}{_GAP}\\?{_CLOSE}{{1,2}}"
    rf"|\\?[\[\uff3b\u3010]{{1,2}}{_GAP}{_LETTER}(?![A-Za-z0-9_\]])"  # never closed
    rf"|(?<![A-Za-z0-9_\[]){_LETTER}{_GAP}\\?[\]\uff3d\u3011]{{1,2}}"  # never opened
    r"|(?-i:\(V\))",
    re.IGNORECASE,
)


def put_trigger(caption: str, trigger: str) -> str:
    """Replaces `[V]` and `[v]` by the trigger, or by `[V]` if there is no trigger."""
    return re.sub(_PLACEHOLDER, lambda _: trigger or PLACEHOLDER, caption, flags=re.IGNORECASE)


def mend_placeholder(caption: str) -> str:
    """Writes near misses of `[V]`, such as `[ V ]` or `<V>`, as `[V]`."""
    return re.sub(f"{_PLACEHOLDER}|{_NEAR_PLACEHOLDER.pattern}", PLACEHOLDER, caption, flags=re.IGNORECASE)


def has_trigger(caption: str, trigger: str = "") -> bool:
    """Whether the caption contains `[V]` or the trigger as a separate word (case-insensitive)."""
    return bool(_concept(trigger).search(caption))


def with_placeholder(caption: str, trigger: str) -> str:
    """Writes the trigger as `[V]`; the opposite of `put_trigger`."""
    return _concept(trigger).sub(PLACEHOLDER, caption)


def around_concept(caption: str, trigger: str = "") -> list[tuple[str, str]]:
    """(text before, text behind) of each `[V]` or trigger in the caption."""
    return [(caption[: found.start()], caption[found.end() :]) for found in _concept(trigger).finditer(caption)]


def remove_trigger(caption: str, trigger: str = "") -> str:
    """Removes `[V]` and the trigger and tidies spaces and commas: "a sks dog, sks" becomes "a dog".

    The prior anchor trains on the result: the ordinary words of the dataset without the name of the concept.
    """
    text = _concept(trigger).sub(" ", caption)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
    return text.strip(" ,;:")


@dataclass(frozen=True)
class Doubt:
    """A warning about a caption that is used.

    Attributes:
        message: the warning.
        line: line of the caption that it refers to.
    """

    message: str
    line: int


def doubts_of(text: str, trigger: str = "") -> list[Doubt]:
    """Warnings about a caption: near misses of `[V]`, replacement characters, text that was encoded twice."""
    doubts = [near] if (near := near_placeholder(text, trigger)) else []
    doubts += [twice] if (twice := _encoded_twice(text)) else []
    lost = text.find("\ufffd")
    if lost >= 0:
        message = "contains U+FFFD, which marks a character that was lost in a conversion: write the right character"
        doubts.append(Doubt(message, _line_of(text, lost)))
    return doubts


def _encoded_twice(text: str) -> Doubt | None:
    """A warning about UTF-8 that another program has read as Windows-1252 and saved again: "cafÃ©" for "café"."""
    if text.isascii():
        return None
    try:
        meant = text.encode("cp1252").decode()
    except ValueError:
        return None
    first = next(place for place, character in enumerate(text) if not character.isascii())
    begin = max(text.rfind(" ", 0, first), text.rfind("\n", 0, first)) + 1
    words = [part[begin:].split()[0] for part in (text, meant)]
    message = f"{words[0]!r} looks like UTF-8 that was read in another encoding and saved again: write {words[1]!r}"
    return Doubt(message, _line_of(text, first))


def near_placeholder(text: str, trigger: str = "") -> Doubt | None:
    """A warning about text that resembles `[V]`, such as `[ V ]`, `<V>`, `[trigger]`, `[V`; None if there is none."""
    rest = _concept(trigger).sub(lambda match: "\0" * len(match.group()), text)
    found = list(_NEAR_PLACEHOLDER.finditer(rest))
    if not found:
        return None
    names = list(dict.fromkeys(match.group() for match in found))
    shown = ", ".join(f"'{name}'" if name.isprintable() else ascii(name) for name in names[:_NAMED])
    message = f"{shown} {'is' if len(names) == 1 else 'are'} not read as the concept: write {PLACEHOLDER}"
    return Doubt(message, _line_of(text, found[0].start()))


def check_prompts(prompts: Sequence[str], what: str, trigger: str = "") -> list[str]:
    """Warnings about prompts that a user typed; `what` names them, e.g. "preview prompt".

    Raises:
        ValueError: a prompt contains invalid characters.
    """
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            check_text(prompt)
        except CaptionError as error:
            raise ValueError(f"{what} {number}: {error}") from error
        found += [f"{what} {number}: {doubt.message}" for doubt in doubts_of(prompt, trigger)]
    return found


def _line_of(text: str, place: int) -> int:
    return len(_LINE_END.findall(text, 0, place)) + 1


def _concept(trigger: str) -> re.Pattern[str]:
    """Matches `[V]` and the trigger, its accents composed or not.

    Only ASCII letters and accents extend a word: Chinese is written without spaces.
    """
    names = [_PLACEHOLDER]
    if trigger.strip():
        for form in dict.fromkeys(unicodedata.normalize(form, trigger) for form in ("NFC", "NFD")):
            words = r"\s+".join(re.escape(word) for word in form.split())
            names.append(rf"(?<![A-Za-z0-9_]){words}(?![A-Za-z0-9_\u0300-\u036f])")
    return re.compile("|".join(names), re.IGNORECASE)
