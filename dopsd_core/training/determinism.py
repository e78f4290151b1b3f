"""Training with torch's deterministic algorithms.

Training on a CPU is always deterministic. On CUDA, the backward of fused attention and some matrix products sum in
arbitrary order, so two equal runs, or a resumed and an uninterrupted one, are close but not bit-identical.
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
    """Why deterministic algorithms cannot be used on `device`, and what to do; None if they can."""
    if device.type != "cuda" or torch.version.hip or os.environ.get(_VARIABLE) in _SETTINGS:
        return None
    return (
        f"deterministic needs the environment variable {_VARIABLE}={_SETTINGS[0]} before the program starts "
        "(ComfyUI sets it when it is started with --deterministic); set it, or turn deterministic off"
    )


@contextmanager
def deterministic_algorithms(is_on: bool) -> Iterator[None]:
    """Inside the `with` block, torch uses only deterministic algorithms, if `is_on`; restores its settings on exit.

    This includes the backward of fused attention.

    Raises:
        ConfigError: the network uses an operation without a deterministic implementation.
    """
    if not is_on:
        yield
        return
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # it would select algorithms by measured speed
        yield
    except RuntimeError as error:
        if (operation := str(error).partition(_WITHOUT)[0]) == str(error):
            raise
        raise ConfigError(
            (f"deterministic is on, but {operation} of this model has no deterministic implementation; turn it off",)
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
