"""Transfers of tensors to the device and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

_MOST_PINNED = 2**30
"""Bytes of pinned memory for one transfer: torch keeps it for the next one, and other programs cannot have it."""


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Moves `tensor`, of any shape, to the device; shares memory if nothing changes.

    An ordinary copy to a CUDA device synchronizes. This one does not: CUDA reads pageable host memory before the call
    returns. Other devices do not guarantee this, and copies from a device must synchronize in any case.
    """
    uploads = tensor.device.type == "cpu" and not tensor.is_pinned() and torch.device(device).type == "cuda"
    return tensor.to(device, dtype, non_blocking=uploads)


def copies_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, of any shape, on the CPU, which share no memory with them.

    From a CUDA device the copies go to pinned memory, up to 1 GiB, and the host waits for all of them once. Ordinary
    memory needs a wait for each tensor, and is slower.
    """
    copies: dict[str, Tensor] = {}
    left = _MOST_PINNED
    device: torch.device | None = None
    for name, tensor in tensors.items():
        pinned = _pinned_like(tensor) if tensor.device.type == "cuda" and tensor.nbytes <= left else None
        if pinned is None:
            copies[name] = tensor.detach().to("cpu", copy=True)
            continue
        copies[name] = pinned.copy_(tensor.detach(), non_blocking=True)
        left, device = left - tensor.nbytes, tensor.device
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _pinned_like(tensor: Tensor) -> Tensor | None:
    """Pinned memory of the tensor's shape; None if the system gives none, as some limit it."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:
        return None
