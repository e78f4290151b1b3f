"""Bytes of the tensors that are alive, counted op by op: peak memory where there is no allocator to ask."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside the `with`, follows the storages that ops return; `peak` is the most that was alive at a time.

    Counts forward and backward in this thread, so on a CPU. What was there before counts as nothing. An op's own
    scratch memory is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id_of(value) for value in tree_iter((args, kwargs or {})) if isinstance(value, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and id_of(value) not in inputs:
                self._add(value)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size


def id_of(tensor: torch.Tensor) -> int:
    """The same for all views of one storage."""
    return tensor.untyped_storage()._cdata
