"""Tensors that several ranks hold a part of each (torch's DTensor)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor, of any shape, is held in parts."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, of any shape, on every rank; a tensor that is not held in parts is returned as it is.

    If it is held in parts, all ranks have to call this together.
    """
    parts: Any = tensor
    return parts.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of any shape, in the same memory; the tensor itself if it is not held in parts."""
    parts: Any = tensor
    return parts.to_local() if is_sharded(tensor) else tensor


def with_parts(part: Tensor, like: Tensor) -> Tensor:
    """A tensor in the layout and shape of `like` whose part on this rank is `part`, in the same memory."""
    from torch.distributed.tensor import DTensor

    layout: Any = like
    return DTensor.from_local(
        part, layout.device_mesh, layout.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, of the same shape as `like` and whole on every rank, in the layout and on the device of `like`.

    It is returned as it is if it is already held in parts, or if `like` is not.
    """
    from torch.distributed.tensor import distribute_tensor

    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    layout: Any = like
    return distribute_tensor(tensor.to(local(like).device), layout.device_mesh, layout.placements, src_data_rank=None)


def mesh_of(device_type: str, size: int) -> DeviceMesh:
    """All ranks in one row; device_type: "cuda" or "cpu"."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (size,))


def swap_parts(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Exchanges the contents of plain tensors of equal shapes, pair by pair, with memory for one of them at a time."""
    for a, b in zip(one, other, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
