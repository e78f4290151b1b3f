"""Base classes of options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError
from .listing import Hint
from .sentences import sentences

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Hint", "Options", "Variant"]


class Options(BaseModel):
    """A frozen set of options, each a field with help, default, bounds and choices.

    Raises:
        ConfigError: values are invalid; one sentence for each problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prefix: ClassVar[str] = ""
    """Prefix of the flat names of the fields, if their own names would be ambiguous."""

    def __init__(self, **values: Any) -> None:
        as_frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            super().__init__(**as_frozen)
        except ValidationError as error:
            raise ConfigError(sentences(error, type(self), self.prefix)) from error

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def to_json(self) -> str:
        """Indented JSON with all options; a choice is an object with its name and its own options."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


class Variant(Options):
    """Options of one choice, with a name in a `Registry`."""

    name: ClassVar[str]
    """Its name in JSON, on the command line and in nodes."""

    summary: ClassVar[str] = ""
    """A short description without a full stop."""

    def with_options(self, **changes: Any) -> Self:
        """`replace` for options that a user sets; dependent options are updated."""
        return self.replace(**changes)
