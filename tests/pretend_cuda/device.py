"""The device's library, loaded before torch, and what it counts."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from pretend_cuda import build

_NO_LIMIT = 2**63 - 1
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclass(frozen=True)
class Counts:
    """What has happened on the device since `reset()`; bytes in use are those of now."""

    syncs: int
    uploads: int
    downloads: int
    operations: int
    uploaded_bytes: int
    live_bytes: int
    peak_bytes: int
    limit_bytes: int


def is_there() -> bool:
    """Whether this process has the device."""
    return _library.cache_info().currsize > 0


def load() -> None:
    """Brings the device into this process.

    Raises:
        RuntimeError: torch was imported before: it asks for CUDA's hooks once, at its own import. Or there can be none
            here.
    """
    if "torch" in sys.modules and not is_there():
        raise RuntimeError("the pretend CUDA device must be loaded before torch is imported")
    _library()
    from pretend_cuda import torch_cuda

    torch_cuda.install()


@cache
def _library() -> Any:
    library: Any = ctypes.CDLL(str(build.build()), mode=ctypes.RTLD_GLOBAL)
    number, nothing = ctypes.c_int64, None
    for name, result, *arguments in (
        ("count", number, ctypes.c_int), ("reset", nothing), ("listen", nothing, _LISTENER), ("limit", nothing, number),
        ("sync", nothing, ctypes.c_char_p), ("add_live", number, number), ("pin", nothing, number, number),
        ("unpin", nothing, number),
    ):  # fmt: skip
        function = getattr(library, f"pretend_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def total_memory() -> int:
    """Bytes of the card: $PRETEND_CUDA_MEMORY, else those of 24 GB."""
    return int(float(os.environ.get("PRETEND_CUDA_MEMORY", "24e9")))


def capability() -> tuple[int, int]:
    """Compute capability of the card: $PRETEND_CUDA_CAPABILITY, else 8.9."""
    major, minor = os.environ.get("PRETEND_CUDA_CAPABILITY", "8.9").split(".")
    return int(major), int(minor)


def counts() -> Counts:
    """The counts of now."""
    return Counts(*(_library().pretend_count(which) for which in range(8)))


def reset() -> None:
    """Counts begin anew, the peak at what is in use."""
    _library().pretend_reset()


def sync(what: str) -> None:
    """Counts a wait of the host."""
    _library().pretend_sync(what.encode())


def add_live(size: int) -> None:
    """Counts `size` bytes as in use, beyond any limit; negative: as given back."""
    _library().pretend_add_live(size)


def pin(address: int, size: int) -> None:
    """The bytes at this address are page-locked from now on."""
    _library().pretend_pin(address, size)


def unpin(address: int) -> None:
    """They no longer are."""
    _library().pretend_unpin(address)


@contextmanager
def limited(more: int) -> Iterator[None]:
    """Inside, at most `more` bytes beyond those in use can be allocated; then torch raises OutOfMemoryError."""
    _library().pretend_limit(counts().live_bytes + more)
    try:
        yield
    finally:
        _library().pretend_limit(_NO_LIMIT)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, `listener` is called with the name of every copy and wait, in the thread that causes it."""
    callback = _LISTENER(lambda what: listener(what.decode()))
    _library().pretend_listen(callback)
    try:
        yield
    finally:
        _library().pretend_listen(_LISTENER(0))
