"""Modules that are imported at their first use.

One module holds everything about a thing that varies: an objective's options and its maths. The options are wanted
where torch is not: `python -m dopsd_core train --help` and a mistyped option answer before torch could be imported.
So the modules below `config.py` write

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")

which the type checker reads as the plain import. Nothing is put into `sys.modules` before the first use (as
`importlib.util.LazyLoader` would do), so that "is torch loaded?" keeps its meaning for every other library.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for the module of its name, and imports that when one of its attributes is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what inspection asks of every module; never a reason to import it
            raise AttributeError(f"module {self.__name__!r} has not been imported yet")
        return getattr(import_module(self.__name__), name)


def lazy(name: str) -> Any:
    """A stand-in for the module `name` (absolute)."""
    return LazyModule(name)
