"""Options that are declared once, with name, help, default, bounds and choices, and everything generated from them.

    class SFT(Objective):
        name: ClassVar[str] = "sft"
        prefix: ClassVar[str] = "sft_"

        shift: float = Field(default=3.0, gt=0, description="shifts the noise levels towards noise; 1 for no shift")

The last line defines the validation with its messages, the JSON, `--sft-shift` on the command line with its help, the
node's input with its tooltip and bounds, and the row of a help page. Each choice (objective, adapter, optimizer,
schedule, teacher) is a `Variant` in a `Registry`; no other code refers to it by name.

The *flat name* of an option is used where there is no nesting: on the command line, in a node's inputs, in a preset. It
consists of the variant's prefix and the field's name: `sft_shift`, `lr`.
"""

from __future__ import annotations

from .errors import ConfigError
from .flat import changed, flattened, split_unused
from .listing import Option, all_options, help_rows
from .model import Hint, Options, Variant
from .registry import Registry

__all__ = [
    "ConfigError",
    "Hint",
    "Option",
    "Options",
    "Registry",
    "Variant",
    "all_options",
    "changed",
    "flattened",
    "help_rows",
    "split_unused",
]
