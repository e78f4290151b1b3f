"""Overrides the `forward` of modules temporarily, as an instance attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def overridden(modules: Iterable[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Inside the `with` block, each module's forward is `wrap(module, forward)`; it is always restored on exit.

    Module paths, parameters and the state dict do not change. A module that is listed twice is wrapped once.
    """
    previous: dict[nn.Module, Forward | None] = {}
    try:
        for module in modules:
            if module not in previous:
                before = module.__dict__.get("forward")
                module.__dict__["forward"] = wrap(module, module.forward)
                previous[module] = before
        yield
    finally:
        for module, forward in previous.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
