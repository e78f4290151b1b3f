"""Options that are declared once: name, help, default, bounds and choices, and everything that is made from them.

    class SFT(Objective):
        name: ClassVar[str] = "sft"
        prefix: ClassVar[str] = "sft_"

        shift: float = Field(default=3.0, gt=0, description="moves the noise levels towards noise; 1 for none")

From the last line come the validation with its messages, the JSON, `--sft-shift` on the command line with its help,
the node's input with its tooltip and bounds, and the row of a help page. A thing that can be chosen (objective,
adapter, optimizer, schedule, teacher) is a `Variant` in a `Registry`, which is all that knows it by name.

By *flat name* an option is known where there is no nesting: the command line, a node's inputs, a preset. It is the
variant's prefix and the field's name: `sft_shift`, `lr`.
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
