"""The option to train with torch's deterministic algorithms.

On a CPU training is deterministic as it is. On CUDA the backward of fused attention and some matrix products add in
any order, so two equal runs, or a resumed one and an uninterrupted one, end close to each other and not bit-identical.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import ConfigError

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_SETTINGS = (":4096:8", ":16:8")
_WITHOUT = " does not have a deterministic implementation"


def obstacle(device: torch.device) -> str | None:
    """What keeps the deterministic algorithms from working on `device`, and the remedy; None if nothing does."""
    if device.type != "cuda" or torch.version.hip or os.environ.get(_VARIABLE) in _SETTINGS:
        return None
    return (
        f"deterministic needs the environment variable {_VARIABLE}={_SETTINGS[0]} before the program starts "
        "(ComfyUI sets it when it is started with --deterministic); set it, or switch deterministic off"
    )


@contextmanager
def deterministic_algorithms(is_on: bool) -> Iterator[None]:
    """Inside the `with`, torch has only deterministic algorithms, if `is_on`; its settings are the caller's after it.

    Torch then gives fused attention a deterministic backward too.

    Raises:
        ConfigError: the network uses an operation that has no deterministic form.
    """
    if not is_on:
        yield
        return
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # it would choose among algorithms by their speed today
        yield
    except RuntimeError as error:
        if (operation := str(error).partition(_WITHOUT)[0]) == str(error):
            raise
        raise ConfigError(
            (f"deterministic is on, and {operation} of this model has no deterministic form; switch it off",)
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
