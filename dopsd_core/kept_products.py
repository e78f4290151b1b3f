"""What a block with gradient checkpointing keeps of its forward, so that its backward does not compute it again.

A product here is the whole output of a frozen Linear, with the cast, dequantisation or transfer of its weight, or of
fused attention. Everything else of a block is cheap and is computed again: norms, RoPE, activations and the two thin
products of a LoRA. The Linears announce theirs by `product`; attention is found by torch's own calls, and what its
backward needs (the output and the sums of its softmax) is kept by torch's selective checkpointing. What of it waits in
RAM: `activation_offloading.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .activation_offloading import BlockInRam, Offloaded

ATTENTION = "attention"
"""Its name among the names of Linears."""

_FUSED = tuple(
    getattr(torch.ops.aten, name)
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, name)
)
_FUSED_OPS = [packet.default for packet in _FUSED]
_LOST = object()


def product(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """The output of `compute`, of any shape, or in the recomputation of a block what its forward has kept of it.

    name: of the Linear.
    """
    kept = _ACTIVE.get()
    return compute() if kept is None else kept.product(name, compute)


def attention(compute: Callable[[], Tensor]) -> Tensor:
    """The output of `compute`, attention by a fused kernel, [B, heads, L, D]; kept as that of `product`."""
    kept = _ACTIVE.get()
    return compute() if kept is None else kept.attention(compute)


@contextmanager
def attention_announced() -> Iterator[None]:
    """Inside the `with` block, torch's attention goes through `attention`; another program's replacement stays.

    A mode would see it too, and with it every other call and every attribute of a tensor, which costs a fast device
    more time than it saves.
    """
    torchs = F.scaled_dot_product_attention

    def announced(*args: Any, **kwargs: Any) -> Tensor:
        return attention(lambda: torchs(*args, **kwargs))

    F.scaled_dot_product_attention = announced
    try:
        yield
    finally:
        if F.scaled_dot_product_attention is announced:
            F.scaled_dot_product_attention = torchs


@dataclass(frozen=True, eq=False)
class _Here:
    """A product that stays on the device.

    Attributes:
        tensor: itself, of any shape.
        version: of the tensor when it was kept.
    """

    tensor: Tensor
    version: int

    def take(self) -> Tensor | None:
        return self.tensor if self.tensor._version == self.version else None  # else the network has written into it


class KeptProducts:
    """The products of one forward of one block.

    names: those to keep, of Linears and `ATTENTION`. in_ram: those of them that wait in RAM, and where.
    """

    def __init__(
        self, names: Collection[str], in_ram: Collection[str] = frozenset(), block: BlockInRam | None = None
    ) -> None:
        self._names = names
        self._in_ram, self._block = (in_ram, block) if block is not None else (frozenset(), None)
        self._outputs: dict[str, deque[_Here | Offloaded | None]] = {}
        self._attention: deque[AbstractContextManager[Any]] = deque()
        self._fused: deque[list[Callable[[], Any]]] = deque()
        self._is_repeated = False

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For the forward of the block and for its recomputation, which may run in another thread.

        A second recomputation, for a backward that is repeated, computes everything: what was kept is used up.
        """
        return _Pass(self, is_repeated=False), _Pass(self, is_repeated=True)

    @contextmanager
    def active(self, is_repeated: bool) -> Iterator[None]:
        """Inside the `with` block, products are kept, or taken from what was kept."""
        self._is_repeated = is_repeated
        if is_repeated and self._block is not None:
            self._block.ahead()
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)
            if is_repeated and self._block is not None:
                self._block.finish()

    def product(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """As the function `product`; of any shape."""
        if name not in self._names:
            return compute()
        outputs = self._outputs.setdefault(name, deque())
        if not self._is_repeated:
            out = compute()
            outputs.append(self._kept(name, out.detach()))
            return out
        kept = outputs.popleft() if outputs else None
        out = None if kept is None else kept.take()
        return compute() if out is None else out

    def attention(self, compute: Callable[[], Tensor]) -> Tensor:
        """As the function `attention`, [B, heads, L, D]; only what a fused kernel returns is kept."""
        if ATTENTION not in self._names:
            return compute()
        if ATTENTION in self._in_ram:
            with _Fused(self):
                return compute()
        if not self._is_repeated:
            keeping, repeating = create_selective_checkpoint_contexts(_FUSED_OPS)
            self._attention.append(repeating)
            with keeping:
                return compute()
        with self._attention.popleft() if self._attention else nullcontext():
            return compute()

    def fused(self, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What a fused kernel of attention returns, of which the activations wait in RAM."""
        if not self._is_repeated:
            out = compute()
            self._fused.append([self._of_attention(one) for one in out])
            return out
        taken = [take() for take in self._fused.popleft()] if self._fused else [_LOST]
        return compute() if any(one is _LOST for one in taken) else tuple(taken)

    def _of_attention(self, one: Any) -> Callable[[], Any]:
        if not isinstance(one, Tensor):
            return lambda: one
        is_large = one.is_floating_point() and one.numel() > 0  # not the state of a random generator
        kept = self._kept(ATTENTION, one) if is_large else _Here(one, one._version)

        def take() -> Any:
            tensor = None if kept is None else kept.take()
            return _LOST if tensor is None else tensor

        return take

    def _kept(self, name: str, out: Tensor) -> _Here | Offloaded | None:
        if name in self._in_ram and self._block is not None:
            return self._block.leave(out)
        return _Here(out, out._version)


class _Pass(AbstractContextManager[None]):
    """`KeptProducts.active`, to be entered any number of times."""

    def __init__(self, kept: KeptProducts, is_repeated: bool) -> None:
        self._kept, self._is_repeated = kept, is_repeated
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._kept.active(self._is_repeated))
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


_ACTIVE: ContextVar[KeptProducts | None] = ContextVar("dopsd_kept_products", default=None)


class _Fused(TorchDispatchMode):
    """Hands every fused kernel of attention to the products, below autograd, which saves what this returns."""

    def __init__(self, kept: KeptProducts) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUSED_OPS:
            return self._kept.fused(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))
