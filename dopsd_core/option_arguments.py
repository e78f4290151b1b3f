"""Arguments of a command for declared options. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from .options import Option

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_option(group: Any, option: Option) -> None:
    """Adds an option to a parser or group; it is not in the parsed arguments unless it is given."""
    name, text = f"--{option.name.replace('_', '-')}", f"{option.help} ({option.facts()})".replace("%", "%%")
    if option.kind is bool:
        group.add_argument(name, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=text)
        return
    words = "{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.kind]
    group.add_argument(
        name,
        default=argparse.SUPPRESS,
        metavar="PATTERN" if option.is_many else words,
        nargs="+" if option.is_many else None,
        help=text,
    )


def given_values(args: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """The values of the options that were given, by name.

    Raises:
        ConfigError: a text is no value of its option.
    """
    return {option.name: _value(option, getattr(args, option.name)) for option in options if option.name in args}


def _value(option: Option, given: Any) -> Any:
    """argparse has a text for most options, a list of them or a bool for others."""
    if option.is_many:
        return tuple(given)
    return option.from_text(given) if isinstance(given, str) else given
