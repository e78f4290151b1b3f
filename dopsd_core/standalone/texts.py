"""What the commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..text import printable


def say(text: str) -> None:
    """Prints a text at once."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def warn(messages: Iterable[str]) -> None:
    """Prints warnings, one line each."""
    for message in messages:
        say(f"warning: {message}")
