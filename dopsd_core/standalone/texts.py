"""What the commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..text import printable


def say(text: str) -> None:
    """Prints a text at once."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def for_console(text: str) -> str:
    """A table's text, with "e" for "é" and "+-" for " ±" where the console lacks these letters; as wide as before."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.replace("é", "e").replace(" ±", "+-")
    return text


def warn(messages: Iterable[str]) -> None:
    """Prints warnings, one line each."""
    for message in messages:
        say(f"warning: {message}")
