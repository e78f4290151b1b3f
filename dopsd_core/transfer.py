"""Tensors on their way to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on the device; the same memory where nothing changes.

    An ordinary copy to a CUDA device makes the host wait until all queued work is done. This one does not: CUDA reads
    ordinary memory of the host before the call returns. Other devices have no such promise, and copies from a device
    must wait in any case.
    """
    uploads = tensor.device.type == "cpu" and not tensor.is_pinned() and torch.device(device).type == "cuda"
    return tensor.to(device, dtype, non_blocking=uploads)
