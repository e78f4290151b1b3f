"""Transfers of tensors to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Moves `tensor`, of any shape, to the device; shares memory if nothing changes.

    An ordinary copy to a CUDA device synchronizes. This one does not: CUDA reads pageable host memory before the call
    returns. Other devices do not guarantee this, and copies from a device must synchronize in any case.
    """
    uploads = tensor.device.type == "cpu" and not tensor.is_pinned() and torch.device(device).type == "cuda"
    return tensor.to(device, dtype, non_blocking=uploads)
