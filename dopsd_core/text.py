"""Output of text with invalid characters. File names may contain invalid bytes, and consoles may lack characters.

Python keeps such bytes as lone surrogates: `caf\\udce9.png` for the Latin-1 name `café.png`. Writing one out as UTF-8
is an error, so every text that is sent, saved or shown goes through `printable`, every text that is hashed through
`hashable`. The log does so for all of its lines: `dopsd_core/__init__.py` gives it `make_printable`.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TextIO

_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escapes every lone surrogate in the text: `\xe9` for a byte of a file name, `\ud83d` for others."""
    return _LONE_SURROGATE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def make_printable(record: logging.LogRecord) -> bool:
    """A filter of a logger, which keeps every record and makes its message `printable`."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def hashable(text: str) -> bytes:
    """UTF-8 with lone surrogates, for a digest: different texts give different bytes."""
    return text.encode("utf-8", "surrogatepass")


def escape_unencodable(*streams: TextIO) -> None:
    """Makes streams escape characters that their encoding lacks, as a Windows console or a pipe may raise an error."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)  # a replaced stream may lack it
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def quoted(text: str) -> str:
    """The text as a string of JSON that is one of YAML and Python too: they forbid some characters that JSON allows."""
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(text, ensure_ascii=False))
