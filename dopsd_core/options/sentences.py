"""Converts pydantic's errors to sentences with the option and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .listing import Option, all_options, own_options

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def sentences(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    """One sentence for each error, in pydantic's order; nested options contribute their own sentences."""
    options = {option.field: option for option in own_options(cls, prefix)}
    messages: list[str] = []
    for finding in error.errors(include_url=False):
        cause = finding.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            messages += cause.problems
        else:
            messages.append(_sentence(finding, options, cls, prefix))
    return tuple(dict.fromkeys(messages))


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The message for an unknown option."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"there is no option {name}; " + (f"did you mean {near[0]}?" if near else "remove it")


def _sentence(finding: Mapping[str, Any], options: Mapping[str, Option], cls: type[BaseModel], prefix: str) -> str:
    field, kind = str(finding["loc"][0]) if finding["loc"] else "", finding["type"]
    option = options.get(field)
    if option is None:
        known = [known.name for known in options.values()]
        if kind != "extra_forbidden":
            return str(finding["msg"])
        inner = {option.name: option.setting for option in all_options(cls) if option.setting}
        if field in inner:
            return f"{field} is an option of the {inner[field]}; write it into that"
        return unknown_option(prefix + field, known)
    value = f"{option.name} is {finding['input']!r}"
    otherwise = f", or null for {option.hint.none}" if option.is_optional else ""
    if kind == "missing":
        return f"{option.name} is missing; give it"
    if kind in _BOUNDS:
        bounds = str(option.bounds)
        to = "to " if bounds.startswith("at ") else "to a value " if bounds.startswith("from ") else ""
        return f"{value}; set it {to}{bounds}{otherwise}"
    if kind == "literal_error":
        return f"{value}; choose one of {', '.join(option.choices)}"
    if kind == "finite_number":
        return f"{value}, it must be a finite number"
    if kind.endswith(("_type", "_from_float", "_parsing")):
        wanted = "a list of texts" if option.is_many else _KINDS[option.kind]
        return f"{value}, it must be {wanted}{otherwise}"
    return f"{value}: {finding['msg'].removeprefix('Value error, ')}"
