"""A node's inputs for options of the core: widget, tooltip, bounds and default, all from what the core declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import io

from ...dopsd_core.adapters.targets import parse_targets
from ...dopsd_core.options import Option

_NONE = 0
"""What a widget has for an option without a value: a number below the smallest that it can have."""


def option_inputs(options: Iterable[Option], *, advanced: Iterable[str] = ()) -> list[Any]:
    """One input per option, under its flat name, in the given order.

    advanced: the flat names of those that a node shows only when asked to.

    Raises:
        TypeError: an option of a kind for which there is no widget.
    """
    hidden = frozenset(advanced)
    return [_input(option, option.name in hidden or None) for option in options]


def option_values(options: Iterable[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the widgets of these options gave, as the options' values by flat name; those not given are left out."""
    return {option.name: _value(option, given[option.name]) for option in options if option.name in given}


def tooltip(option: Option) -> str:
    """What an option does, for whom it counts, and what its smallest value stands for."""
    words = option.help[0].upper() + option.help[1:] + "."
    if option.is_optional:
        words += f" {_NONE}: {option.hint.none}."
    elif option.is_many:
        words += f" Empty: {option.hint.none}."
    return words + (f" Counts with {option.setting} {' or '.join(option.variants)}." if option.setting else "")


def _input(option: Option, advanced: bool | None) -> Any:
    about: dict[str, Any] = {"tooltip": tooltip(option), "advanced": advanced}
    if option.choices:
        return io.Combo.Input(option.name, options=list(option.choices), default=option.default, **about)
    if option.is_many:
        return io.String.Input(option.name, default=", ".join(option.default), **about)
    if option.kind is bool:
        return io.Boolean.Input(option.name, default=option.default, **about)
    if option.kind is int:
        # by the name "seed" the page would draw another one after each run, and no run would ever be resumed
        about |= {"control_after_generate": False} if option.name == "seed" else {}
        return io.Int.Input(option.name, **_range(option), **about)
    if option.kind is float:
        return io.Float.Input(option.name, **_range(option), step=option.hint.step, round=False, **about)
    raise TypeError(f"there is no widget for the option {option.name} of kind {option.kind.__name__}")


def _range(option: Option) -> dict[str, Any]:
    """default, min, max. A bound that is itself too small stays: the core says what is wrong with it."""
    bounds = option.bounds
    low = bounds.low if bounds.low is not None else bounds.above
    high = next((number for number in (bounds.high, bounds.below, option.hint.most) if number is not None), None)
    default = _NONE if option.default is None else option.default
    return {"default": default, "min": _NONE if option.is_optional else low, "max": high}


def _value(option: Option, given: Any) -> Any:
    if option.is_many:
        return parse_targets(given)
    return None if option.is_optional and given == _NONE else given
