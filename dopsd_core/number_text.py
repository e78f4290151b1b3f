"""Numbers that are written as text, on a command line or in a text field of a node. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def read_int(text: str) -> int:
    """The whole number in a text; not 1_0, which Python reads as 10.

    Raises:
        ValueError: it is none.
    """
    return _read(int, text, "a whole number")


def read_float(text: str) -> float:
    """The finite number in a text; not 1_0, which Python reads as 10.

    Raises:
        ValueError: it is none.
    """
    return _read(float, text, "a number")


def int_argument(at_least: int | None = None) -> Callable[[str], int]:
    """The `type` of an argument of argparse that is a whole number."""
    return _argument(read_int, at_least)


def float_argument(at_least: float | None = None) -> Callable[[str], float]:
    """The `type` of an argument of argparse that is a finite number."""
    return _argument(read_float, at_least)


def _read(kind: Callable[[str], Number], text: str, what: str) -> Number:
    try:
        value = kind(text if "_" not in text else "")
    except ValueError:
        value = None
    if value is None or not math.isfinite(value):
        raise ValueError(f"{text!r} is not {what}")
    return value


def _argument(read: Callable[[str], Number], at_least: Number | None) -> Callable[[str], Number]:
    def argument(text: str) -> Number:
        try:
            value = read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if at_least is not None and value < at_least:
            raise argparse.ArgumentTypeError(f"{text} is too small; give at least {at_least}")
        return value

    return argument
