"""Counts allocated bytes and FLOPs op by op, also for steps that do not fit in the memory of this machine.

In a dry run the network lies on torch's "meta" device: tensors have shapes and no contents, so that a step at the real
size takes seconds and no memory. Every op goes through autograd and the counters as it would on a GPU, with the kernels
that CUDA has fused and a CPU has not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

META = torch.device("meta")


def _attention_flop(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Scores and values, from the shapes [B, H, L, d]."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward_flop(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """Five products where the forward has two."""
    return 5 * _attention_flop(query, key) // 2


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}
"""For FlopCounterMode, which leaves these two out."""


class LiveBytes(TorchDispatchMode):
    """Inside the `with`, follows the storages that ops return; `peak` is the most that was alive at a time.

    Counts forward and backward in this thread, so not on CUDA. What was there before counts as nothing. An op's own
    scratch memory is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id_of(local(value)) for value in tree_iter((args, kwargs or {})) if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor) and id_of(local(value)) not in inputs:
                self._add(local(value))
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._remember(storage, size)

    def resize(self, tensor: Tensor, size: int) -> None:
        """Follows a storage, of a tensor of any shape, that was freed or allocated again without an op, to `size`."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            self._known[key].detach()
            self.now += size - self._sizes[key]
            self.peak = max(self.peak, self.now)
            self._remember(tensor.untyped_storage(), size)

    def _remember(self, storage: Any, size: int) -> None:
        key = storage._cdata
        self._sizes[key] = size
        self._known[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of any shape, which may be held in parts (`dopsd_core.dtensors`).

    Written again here, since tests inside ComfyUI load this file where the core has another name.
    """
    parts: Any = tensor
    return parts.to_local() if hasattr(tensor, "to_local") else tensor


def id_of(tensor: Tensor) -> int:
    """A number that is the same for all views of one storage, of any shape."""
    return tensor.untyped_storage()._cdata


class FusedNorm(torch.autograd.Function):
    """RMSNorm as torch has it on CUDA since 2.9: keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., D] -> the same shape."""
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [..., D] -> the same shape."""
        contiguous = ctx.saved_tensors[0].contiguous(), grad.contiguous()
        return torch.empty_like(contiguous[0])


def flash_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[B, H, L, d] each -> [B, L, H d], as ComfyUI's attention on torch's fused kernel."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(len(out), -1, heads * out.shape[-1])


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """[B, H, L, d] each -> the same shape, by the kernel that CUDA has."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


def uncounted_ram(host_memory: Any) -> Any:
    """Inside the `with`, what activation offloading has in RAM is on the device after all, and no counter sees it.

    host_memory: the core's module.
    """

    def take(_: Any, like: Tensor) -> Tensor:
        with _disable_current_modes():
            return torch.empty_like(like)

    return patch.object(host_memory.HostPool, "take", take)


@contextmanager
def dry_run(host: Any, objectives: Any, host_memory: Any = None) -> Iterator[None]:
    """Inside the `with`, a ComfyDenoiser of the module `host` (`nodes.comfy_host.denoiser`) works on the meta device,
    and the module `objectives` of the core does not read losses, which have no values.

    host_memory: the core's module, for activation offloading.
    """
    with ExitStack() as stack:
        if host_memory is not None:
            stack.enter_context(uncounted_ram(host_memory))
        for owner, name, instead in (
            (torch.nn.functional, "rms_norm", lambda x, *_, **__: FusedNorm.apply(x)),
            (torch.nn.functional, "scaled_dot_product_attention", fused_attention),
            (host, "plain_attention", lambda _, q, k, v, heads, *__, **___: flash_attention(q, k, v, heads)),
            (host.ComfyDenoiser, "load", lambda *_: None),
            (objectives.ObjectiveOutput, "of", lambda *_, **__: None),
        ):
            stack.enter_context(patch.object(owner, name, instead))
        yield
