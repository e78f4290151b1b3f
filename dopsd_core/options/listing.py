"""Lists the declarations of options, to generate a command line, a node or a help page from."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from ..number_text import read_float, read_int
from .registry import Registry

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from .model import Variant


@dataclass(frozen=True)
class Hint:
    """Metadata of an option in addition to pydantic's, as an annotation of its type.

    Attributes:
        step: increment of a widget.
        most: maximum of a widget, if the option has no upper bound.
        none: meaning of None for an optional option ("all of the steps").
        may_change: whether a run may be resumed with another value.
        from_host: whether the host sets it instead of the user.
    """

    step: float | None = None
    most: float | None = None
    none: str = ""
    may_change: bool = False
    from_host: bool = False


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number; None for no bound.

    Attributes:
        low: minimum.
        high: maximum.
        above: exclusive minimum.
        below: exclusive maximum.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        """Such as "at least 1", "above 0 and at most 0.1", "from 0 to 1"; empty without bounds."""
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        words = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        return " and ".join(f"{word} {number:g}" for word, number in words if number is not None)


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        name: flat name.
        field: name in the class that declares it.
        kind: type of the value, or of an element of a tuple.
        default: default value.
        help: description, without a full stop.
        bounds: bounds of a number.
        choices: allowed values; empty if there is no restriction.
        is_optional: whether it may be None.
        is_many: whether it is a tuple.
        setting: the setting whose variants have this option; empty for an option of the run.
        variants: names of these variants.
        hint: further metadata.
    """

    name: str
    field: str
    kind: type
    default: Any
    help: str
    bounds: Bounds = Bounds()
    choices: tuple[str, ...] = ()
    is_optional: bool = False
    is_many: bool = False
    setting: str = ""
    variants: tuple[str, ...] = ()
    hint: Hint = Hint()

    def facts(self) -> str:
        """Bounds and default: "at least 1; default 100"."""
        bounds = str(self.bounds)
        return (f"{bounds}; " if bounds else "") + f"default {self._default_text()}"

    def from_text(self, text: str) -> Any:
        """The value that a text stands for; the text itself where it stands for none, for the configuration to report.

        "none" is None of an optional option; several values are separated by spaces.
        """
        if self.is_many:
            return tuple(text.split())
        if self.is_optional and text == "none":
            return None
        try:
            return _READERS.get(self.kind, str)(text)
        except ValueError:
            return text

    def _default_text(self) -> str:
        if self.default is None or (self.is_many and not self.default):
            return f"none: {self.hint.none}"
        if self.is_many:
            return ", ".join(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default) or "empty"


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


_READERS: Mapping[type, Callable[[str], Any]] = {int: read_int, float: read_float, bool: _read_bool}


Offers = Callable[["type[Variant]"], bool]
"""Whether a host offers this variant of a choice."""


def own_options(
    cls: type[BaseModel], prefix: str = "", values: BaseModel | None = None, offers: Offers = bool
) -> list[Option]:
    """The options that a class declares, in order; includes choices, but not the options of their variants.

    Args:
        prefix: of their flat names.
        values: an instance whose values are shown as the defaults.
        offers: which variants are listed; by default all.
    """
    made = []
    for name, declared in cls.model_fields.items():
        default = declared.get_default(call_default_factory=True) if values is None else getattr(values, name)
        made.append(_option(prefix + name, name, declared, default, offers))
    return made


def all_options(cls: type[BaseModel], values: BaseModel | None = None, offers: Offers = bool) -> list[Option]:
    """All options of a class: its own, and after each choice those of all its variants.

    Args:
        values: an instance whose values are shown as the defaults.
        offers: which variants are listed; by default all.

    Raises:
        TypeError: two options with different declarations have the same flat name.
    """
    options: dict[str, Option] = {}
    for option in own_options(cls, values=values, offers=offers):
        _add(options, option)
        registry = registry_of(cls.model_fields[option.field])
        if registry is None:
            continue
        kept = {} if values is None else _values(getattr(values, option.field))
        for variant in filter(offers, registry.values()):
            for inner in own_options(variant, variant.prefix):
                default = kept.get(inner.name, inner.default)
                _add(options, replace(inner, default=default, setting=option.name, variants=(variant.name,)))
    return list(options.values())


def help_rows(options: Sequence[Option]) -> Iterator[tuple[str, str, str]]:
    """(flat name, choices or bounds and default, description) of each option, as rows of a help page's table."""
    for option in options:
        owner = f"{option.setting} {', '.join(option.variants)}: " if option.setting else ""
        yield option.name, "; ".join([*filter(None, [", ".join(option.choices)]), option.facts()]), owner + option.help


def registry_of(declared: FieldInfo) -> Registry[Any] | None:
    """The registry of a field that is a choice."""
    return next((part for part in declared.metadata if isinstance(part, Registry)), None)


def _values(variant: Variant) -> dict[str, Any]:
    """The variant's values by flat name."""
    return {variant.prefix + name: getattr(variant, name) for name in type(variant).model_fields}


def _add(options: dict[str, Option], option: Option) -> None:
    there = options.get(option.name)
    if there is None:
        options[option.name] = option
        return
    same = replace(there, variants=option.variants, default=option.default, help=option.help) == option
    if not same or not option.setting:
        raise TypeError(f"two options have the name {option.name!r}; give one of the variants another prefix")
    options[option.name] = replace(there, variants=there.variants + option.variants)


def _option(name: str, field_name: str, declared: FieldInfo, default: Any, offers: Offers) -> Option:
    registry = registry_of(declared)
    hint = next((part for part in declared.metadata if isinstance(part, Hint)), Hint())
    about = declared.description or ""
    if registry is not None:
        variants = list(filter(offers, registry.values()))
        about = ". ".join([about, *(f"{v.name}: {v.summary}" for v in variants if v.summary)])
        return Option(name, field_name, str, default.name, about, choices=tuple(v.name for v in variants), hint=hint)
    kind, choices, is_optional, is_many = _kind(declared.annotation)
    limits: dict[type, Any] = {type(part): part for part in declared.metadata}
    bounds = Bounds(
        low=limits[Ge].ge if Ge in limits else None,
        high=limits[Le].le if Le in limits else None,
        above=limits[Gt].gt if Gt in limits else None,
        below=limits[Lt].lt if Lt in limits else None,
    )
    return Option(name, field_name, kind, default, about, bounds, choices, is_optional, is_many, hint=hint)


def _kind(annotation: Any) -> tuple[type, tuple[str, ...], bool, bool]:
    """(type, choices, whether it is optional, whether it is a tuple) from a field's annotation."""
    is_optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        is_optional = type(None) in get_args(annotation)
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return str, get_args(annotation), is_optional, False
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], (), is_optional, True
    return annotation, (), is_optional, False
