"""A `forward` over modules of someone else's network, as instance attribute, for the time of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def overridden(modules: Iterable[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Inside the `with`, each module's forward is `wrap(module, forward)`; as it was after it, whatever happens.

    Module paths, parameters and the state dict stay as they are. A module that is listed twice is wrapped once.
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
