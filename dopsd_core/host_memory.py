"""Memory in RAM for tensors that leave the GPU for a part of a step, used again and again."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("dopsd")

_SLAB = 2**30
"""Bytes that are allocated at a time: a power of two, to which torch rounds pinned memory up."""
_ALIGNMENT = 512
_RESERVE = 2 * 10**9
"""Bytes of RAM that are left to other programs."""


def available_ram() -> int | None:
    """Bytes of RAM that programs can still use; None if that is not known, without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


@dataclass(eq=False)
class _Slab:
    """Memory that is given out from its start to its end, and from its start again once all of it is back.

    Attributes:
        memory: bytes [n].
        used: how many of them are given out or were, since all were back.
        regions: how many are given out.
    """

    memory: Tensor
    used: int = 0
    regions: int = 0

    def take(self, size: int) -> Tensor | None:
        if self.used + size > len(self.memory):
            return None
        region = self.memory[self.used : self.used + size]
        self.used, self.regions = self.used + -(-size // _ALIGNMENT) * _ALIGNMENT, self.regions + 1
        return region

    def give_back(self) -> None:
        self.regions -= 1
        if not self.regions:
            self.used = 0


class HostPool:
    """Memory for copies in RAM, in slabs that are kept until `close`.

    is_pinned: whether the device can copy to it and from it while it computes.
    """

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._slabs: list[_Slab] = []
        self._has_warned = False

    @property
    def held(self) -> int:
        """Bytes of RAM that it holds."""
        return sum(len(slab.memory) for slab in self._slabs)

    def take(self, like: Tensor) -> Tensor | None:
        """Memory for a copy of a tensor, in its shape and order; it is back when the result is no longer referenced.

        None if the RAM is full, or the system pins no more; a line of the log says so once.
        """
        for slab in self._slabs:
            if (region := slab.take(like.nbytes)) is not None:
                return _shaped(region, like, slab)
        slab = self._new_slab(max(_SLAB, 1 << (like.nbytes - 1).bit_length()))
        if slab is None:
            return None
        self._slabs.append(slab)
        region = slab.take(like.nbytes)
        return None if region is None else _shaped(region, like, slab)

    def close(self) -> None:
        """Frees the memory that is not given out; the rest is freed with what refers to it."""
        self._slabs.clear()
        empty = getattr(torch.accelerator, "empty_host_cache", None) if hasattr(torch, "accelerator") else None
        if self._is_pinned and empty is not None:  # else torch keeps it pinned for later
            empty()

    def _new_slab(self, size: int) -> _Slab | None:
        free = available_ram()
        try:
            if free is None or free - size >= _RESERVE:
                return _Slab(torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned))
        except RuntimeError:
            pass
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "activation_offloading: there is no free RAM beyond %.1f GB, so that more is computed again (slower, "
                "same result); close other programs, or choose a smaller resolution or batch_size",
                self.held / 1e9,
            )
        return None


def _shaped(region: Tensor, like: Tensor, slab: _Slab) -> Tensor:
    order = torch.empty_like(like, device="meta").stride() if like.device.type != "meta" else like.stride()
    out = region.view(like.dtype).as_strided(like.shape, order, region.storage_offset() // like.element_size())
    weakref.finalize(out, slab.give_back).atexit = False
    return out
