"""Modules that are imported on first use.

A module of an objective contains both its options and its math. The options are also needed without torch: the output
of `python -m dopsd_core train --help` and the error for a mistyped option must not wait for its import. So the modules
that `config.py` imports write

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")

which the type checker treats as a plain import. Unlike `importlib.util.LazyLoader`, this does not add to `sys.modules`
before the first use, because other libraries check there whether torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A stand-in for a module, which is imported on the first access to an attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # introspection must not import the module
            raise AttributeError(f"module {self.__name__!r} has not been imported yet")
        return getattr(import_module(self.__name__), name)


def lazy(name: str) -> Any:
    """A stand-in for the module `name` (absolute)."""
    return LazyModule(name)
