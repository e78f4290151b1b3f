"""Text that leaves the program. File names may hold bytes that are no text, and not every console can show all of it.

Python keeps such bytes as lone surrogates: `caf\\udce9.png` for the Latin-1 name `café.png`. Writing one out as UTF-8
is an error, so every text that is sent, saved or shown goes through `printable`, every text that is hashed through
`hashable`. The log does so for all of its lines: `dopsd_core/__init__.py` gives it `make_printable`.
"""

from __future__ import annotations

import logging
import re
from typing import TextIO

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with every lone surrogate written out: `\xe9` for a byte of a file name, `\ud83d` for any other."""
    return _LONE_SURROGATE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def make_printable(record: logging.LogRecord) -> bool:
    """A filter of a logger, which keeps every record and makes its message `printable`."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def hashable(text: str) -> bytes:
    """UTF-8 for a digest, lone surrogates included: different texts give different bytes."""
    return text.encode("utf-8", "surrogatepass")


def escape_unencodable(*streams: TextIO) -> None:
    """Makes streams write what their encoding lacks as escapes, where a Windows console or a pipe would raise."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)  # a stream that a caller put in its place may have none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
