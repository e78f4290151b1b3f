"""Registries of the variants of a setting, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic_core import core_schema

from .errors import ConfigError

if TYPE_CHECKING:
    from .model import Variant

V = TypeVar("V", bound="Variant")


class Registry(Mapping[str, type[V]], Generic[V]):
    """The variants of a setting: name -> class of options.

    As an annotation of a field, it validates the field: `optimizer: Annotated[Optimizer, OPTIMIZERS]` accepts an
    instance of a registered class, its JSON form {"name": "adamw", "lr": 1e-4}, or just the name.
    """

    def __init__(self, setting: str, *variants: type[V]) -> None:
        """setting: name of the field and option."""
        self.setting = setting
        self._variants: dict[str, type[V]] = {variant.name: variant for variant in variants}

    def __getitem__(self, name: str) -> type[V]:
        return self._variants[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variants)

    def __len__(self) -> int:
        return len(self._variants)

    @contextmanager
    def registered(self, *variants: type[V]) -> Iterator[None]:
        """Adds variants inside the `with` block, for tests and for code with its own variants."""
        before = dict(self._variants)
        self._variants |= {variant.name: variant for variant in variants}
        try:
            yield
        finally:
            self._variants = before

    def validated(self, value: Any) -> V:
        """Converts `value` to a variant.

        Raises:
            ConfigError: it is not a variant of this setting, or has invalid options.
        """
        if isinstance(value, tuple(self.values())):
            return value
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise ConfigError((f"{self.setting} is {value!r}; give a name and options, such as {self._example()}",))
        fields = dict(given)
        name = fields.pop("name", None)
        if not isinstance(name, str) or name not in self:
            raise ConfigError((f"{self.setting} is {name!r}; choose one of {', '.join(self)}",))
        return self[name](**fields)

    def _example(self) -> str:
        return f'{{"name": "{next(iter(self))}"}}'

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validated, serialization=core_schema.plain_serializer_function_ser_schema(_tagged)
        )


def _tagged(variant: Variant) -> dict[str, Any]:
    return {"name": variant.name, **variant.model_dump(mode="json")}
