"""Memory that the process uses now, for the log of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GB = 1e9


@dataclass(frozen=True)
class MemoryInUse:
    """Memory in 10^9 bytes; None if unknown.

    Attributes:
        gpu_gb: allocated on the device by torch; None for a CPU.
        ram_gb: resident of this process.
    """

    gpu_gb: float | None
    ram_gb: float | None


def memory_in_use(device: torch.device) -> MemoryInUse:
    """The memory that this process uses now."""
    return MemoryInUse(*(None if size is None else size / _GB for size in (_allocated(device), _resident())))


def _allocated(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    count = getattr(getattr(torch, device.type, None), "memory_allocated", None)  # torch.cuda, torch.xpu
    return None if count is None else count(device)


def _resident() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss
