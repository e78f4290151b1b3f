"""What a setting can be chosen from, by name."""

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
    """The variants of one setting: name -> class of options.

    Written beside a field's type, it validates the field: `optimizer: Annotated[Optimizer, OPTIMIZERS]` takes an
    instance of a registered class, or what JSON has of one: {"name": "adamw", "lr": 1e-4}, or the name alone.
    """

    def __init__(self, setting: str, *variants: type[V]) -> None:
        """setting: what is chosen, the name of its field and option."""
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
        """Further variants inside the `with`; for tests, and for code that brings its own."""
        before = dict(self._variants)
        self._variants |= {variant.name: variant for variant in variants}
        try:
            yield
        finally:
            self._variants = before

    def validated(self, value: Any) -> V:
        """The variant that `value` is or describes.

        Raises:
            ConfigError: it is no variant of this setting, or one with impossible options.
        """
        if isinstance(value, tuple(self.values())):
            return value
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise ConfigError((f"{self.setting} is {value!r}; give a name and its options, as {self._example()}",))
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
