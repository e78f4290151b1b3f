"""A node's inputs for the core's options: widget, tooltip, bounds and default from their declarations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import io

from ...dopsd_core.adapters.targets import parse_targets
from ...dopsd_core.options import Option

_NONE = 0
"""The widget's value for an option without a value: a number below its smallest one."""


def option_inputs(options: Iterable[Option], *, advanced: Iterable[str] = ()) -> list[Any]:
    """One input per option, under its flat name, in the given order.

    Args:
        advanced: the flat names of those that a node only shows under its advanced inputs.

    Raises:
        TypeError: there is no widget for the kind of an option.
    """
    hidden = frozenset(advanced)
    return [_input(option, option.name in hidden or None) for option in options]


def option_values(options: Iterable[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options' values by flat name, from the values of their widgets; options that are not given are left out."""
    return {option.name: _value(option, given[option.name]) for option in options if option.name in given}


def widget_value(option: Option, value: Any) -> Any:
    """The widget's value for this option value; the inverse of `option_values`."""
    if option.is_many:
        return ", ".join(value)
    return _NONE if value is None else value


def tooltip(option: Option) -> str:
    """What an option does, with which choice it has an effect, and what its smallest value means."""
    words = option.help[0].upper() + option.help[1:] + "."
    if option.is_optional:
        words += f" {_NONE}: {option.hint.none}."
    elif option.is_many:
        words += f" Empty: {option.hint.none}."
    return words + (f" Counts with {option.setting} {' or '.join(option.variants)}." if option.setting else "")


def _input(option: Option, advanced: bool | None) -> Any:
    about: dict[str, Any] = {"tooltip": tooltip(option), "advanced": advanced, "optional": True}
    if option.choices:
        return io.Combo.Input(option.name, options=list(option.choices), default=option.default, **about)
    if option.is_many or option.kind is str:
        return io.String.Input(option.name, default=widget_value(option, option.default), **about)
    if option.kind is bool:
        return io.Boolean.Input(option.name, default=option.default, **about)
    if option.kind is int:
        # for an input named "seed" the page would change it after each run, and no run would ever be resumed
        about |= {"control_after_generate": False} if option.name == "seed" else {}
        return io.Int.Input(option.name, **_range(option), **about)
    if option.kind is float:
        return io.Float.Input(option.name, **_range(option), step=option.hint.step, round=False, **about)
    raise TypeError(f"there is no widget for the option {option.name} of kind {option.kind.__name__}")


def _range(option: Option) -> dict[str, Any]:
    """default, min, max. An exclusive bound is used as it is: the core reports a value at it."""
    bounds = option.bounds
    low = bounds.low if bounds.low is not None else bounds.above
    high = next((number for number in (bounds.high, bounds.below, option.hint.most) if number is not None), None)
    return {"default": widget_value(option, option.default), "min": _NONE if option.is_optional else low, "max": high}


def _value(option: Option, given: Any) -> Any:
    if option.is_many:
        return parse_targets(given)
    return None if option.is_optional and given == _NONE else given
