"""Options by flat name, as on a command line, in a node or in a preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import ConfigError
from .listing import all_options, registry_of
from .model import Options, Variant
from .registry import Registry
from .sentences import unknown_option

T = TypeVar("T", bound=Options)


def flattened(options: Options) -> dict[str, Any]:
    """All active options by flat name: the class's own, the name of each choice, and the options of chosen variants."""
    flat: dict[str, Any] = {}
    for name, declared in type(options).model_fields.items():
        value = getattr(options, name)
        if registry_of(declared) is None:
            flat[name] = value
        else:
            flat[name] = value.name
            flat |= {value.prefix + inner: getattr(value, inner) for inner in type(value).model_fields}
    return flat


def changed(options: T, changes: Mapping[str, Any]) -> T:
    """Applies `changes` by flat name.

    If another variant is chosen, it keeps the options that both have (the learning rate of an optimizer) and uses its
    defaults for the rest.

    Raises:
        ConfigError: values are invalid, names are unknown, or options belong to variants that are not chosen; the
            message lists all of them.
    """
    left = dict(changes)
    fields: dict[str, Any] = {}
    problems: list[str] = []
    for name, declared in type(options).model_fields.items():
        registry = registry_of(declared)
        if registry is None:
            fields[name] = left.pop(name, getattr(options, name))
            continue
        try:
            fields[name] = _chosen(getattr(options, name), registry, left)
        except ConfigError as error:
            problems += error.problems
    chosen = {**flattened(options), **changes}
    problems += [_unused_sentence(name, options, chosen) for name in left]
    try:
        made = type(options)(**fields)
    except ConfigError as error:
        raise ConfigError((*error.problems, *problems)) from error
    if problems:
        raise ConfigError(problems)
    return made


def split_unused(cls: type[Options], values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(values without the options of variants that are not chosen, the names of those among them that were set).

    For hosts that show all options at once: an option with its default value counts as not set.
    """
    options = {option.name: option for option in all_options(cls)}
    used, unused = {}, []
    for name, value in values.items():
        option = options.get(name)
        if option is None or not option.setting or _choice(option.setting, values, options) in option.variants:
            used[name] = value
        elif value != option.default:
            unused.append(name)
    return used, tuple(unused)


def _choice(setting: str, values: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return values.get(setting, options[setting].default)


def _chosen(current: Variant, registry: Registry[Any], left: dict[str, Any]) -> Variant:
    """The variant after the changes; removes its options from `left`."""
    name = left.pop(registry.setting, current.name)
    if not isinstance(name, str) or name not in registry:
        for variant in registry.values():  # the intended variant is unknown
            _take(variant, left)
        return registry.validated(name)
    wanted = registry[name]
    given = _take(wanted, left)
    if wanted is type(current):
        return current.with_options(**given) if given else current
    common = _take(type(current), {wanted.prefix + field: value for field, value in given.items()})
    moved = current.with_options(**common) if common else current  # options that depend on these follow them
    shared = {moved.prefix + field: getattr(moved, field) for field in type(moved).model_fields}
    return wanted(**(_take(wanted, shared) | given))


def _take(variant: type[Variant], flat: dict[str, Any]) -> dict[str, Any]:
    """Removes the variant's fields from the flat names and returns them."""
    names = {variant.prefix + field: field for field in variant.model_fields}
    return {names[name]: flat.pop(name) for name in list(flat) if name in names}


def _unused_sentence(name: str, options: Options, chosen: Mapping[str, Any]) -> str:
    known = {option.name: option for option in all_options(type(options))}
    option = known.get(name)
    if option is None:
        return unknown_option(name, known)
    setting, owners = option.setting, " or ".join(option.variants)
    own = _own_name(name, options, setting, chosen[setting])
    return (
        f"{name} is an option of {setting} {owners}, and {setting} is {chosen[setting]}"
        + (f", whose own is {own}; set that" if own else "; leave it out")
        + f", or set {setting} to {owners}"
    )


def _own_name(name: str, options: Options, setting: str, chosen: Any) -> str:
    """The flat name of the same field in the chosen variant: custom_lr for lr; "" if it has none."""
    fields = type(options).model_fields.values()
    (registry,) = [found for field in fields if (found := registry_of(field)) and found.setting == setting]
    if chosen not in registry:
        return ""
    prefixes = (variant.prefix for variant in registry.values() if name.startswith(variant.prefix))
    bare = {name.removeprefix(prefix) for prefix in prefixes}
    return next((registry[chosen].prefix + field for field in registry[chosen].model_fields if field in bare), "")
