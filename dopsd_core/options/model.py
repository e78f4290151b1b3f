"""The base classes of all options."""

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
    """A frozen set of options, each a field with its help, default, bounds and choices. Raises ConfigError when made
    wrong, with a sentence for everything that is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prefix: ClassVar[str] = ""
    """Stands before the flat names of the fields, where these alone would not tell whose they are."""

    def __init__(self, **values: Any) -> None:
        as_frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            super().__init__(**as_frozen)
        except ValidationError as error:
            raise ConfigError(sentences(error, type(self), self.prefix)) from error

    def replace(self, **changes: Any) -> Self:
        """The same with some fields changed, checked again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def to_json(self) -> str:
        """Indented JSON with every option; a choice is an object with its name and its own options."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


class Variant(Options):
    """Options of one thing to choose, under its name in a `Registry`."""

    name: ClassVar[str]
    """What it is chosen by: in JSON, on the command line, in a node."""

    summary: ClassVar[str] = ""
    """What it is, in a few words without a full stop, for those who choose."""

    def with_options(self, **changes: Any) -> Self:
        """`replace` for options that a user gives; where some follow from others, they follow."""
        return self.replace(**changes)
