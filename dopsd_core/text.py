"""Output of text with invalid characters. File names may contain invalid bytes, and consoles may lack characters.

Python represents such bytes as lone surrogates: `caf\\udce9.png` for the Latin-1 name `café.png`. Encoding them as
UTF-8 is an error, so every text that is sent, saved or displayed must pass through `printable`, and every text that is
hashed through `hashable`.
"""

from __future__ import annotations

import re
from typing import TextIO

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escapes every lone surrogate in the text: `\xe9` for a byte of a file name, `\ud83d` for others."""
    return _LONE_SURROGATE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def hashable(text: str) -> bytes:
    """UTF-8 with lone surrogates, for a digest: different texts give different bytes."""
    return text.encode("utf-8", "surrogatepass")


def escape_unencodable(*streams: TextIO) -> None:
    """Makes streams escape characters that their encoding lacks, as a Windows console or a pipe may raise an error."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)  # a replaced stream may lack it
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
