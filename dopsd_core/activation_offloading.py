"""Activation offloading: what a block keeps for its backward waits in RAM, and comes back ahead of that backward.

A copy to RAM starts as soon as the tensor is there, on a stream of its own, while the network computes on. In the
backward the tensors that are needed next are on their way while others are in use. Both ways a limited number of bytes
is in flight. The bits are the same.

No memory is used for something else while a copy needs it: a tensor on its way out is referenced until the computing
stream has been made to wait for the copy, one on its way in is allocated by the computing stream, which the copy waits
for, and all copies are on one stream, in the order of their use of memory in RAM. The host waits for nothing.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .host_memory import HostPool


class Offloaded:
    """A tensor in RAM that comes back when it is taken.

    Attributes:
        host: its copy in RAM, of any shape; None if the original was overwritten before the copy, or after the run.
        arriving: on the device, perhaps still on its way, with the event that ends it.
    """

    def __init__(self, block: BlockInRam, host: Tensor, device: torch.device) -> None:
        self.host: Tensor | None = host
        self.arriving: tuple[Tensor, Any] | None = None
        self._block, self._device = weakref.ref(block), device

    def take(self) -> Tensor | None:
        """The tensor on its device, of any shape; None if it was overwritten and has to be computed again."""
        block = self._block()
        return None if block is None else block.take(self)

    def new(self) -> Tensor | None:
        """Memory for it on the device, of its shape."""
        return None if self.host is None else torch.empty_like(self.host, device=self._device, pin_memory=False)


class BlockInRam:
    """What one forward of one block has in RAM, in the order in which its recomputation will ask for it."""

    def __init__(self, offloading: Offloading, before: BlockInRam | None) -> None:
        self._offloading = offloading
        self._before = weakref.ref(before) if before is not None else None
        self._waiting: list[Offloaded] = []

    def leave(self, tensor: Tensor) -> Offloaded | None:
        """Starts to copy a tensor, of any shape and without a graph, to RAM; None if there is no room."""
        one = self._offloading.leave(self, tensor)
        if one is not None:
            self._waiting.append(one)
        return one

    def ahead(self) -> None:
        """Starts to bring back what comes next, of this block and of those before it."""
        self._offloading.ahead(self)

    def take(self, one: Offloaded) -> Tensor | None:
        """The tensor on the device, of any shape, and the next ones are on their way."""
        if one in self._waiting:
            self._waiting.remove(one)
        tensor = self._offloading.bring(one)
        self.ahead()
        return tensor

    def finish(self) -> None:
        """What the recomputation has not asked for does not come any more."""
        for one in self._waiting:
            self._offloading.forget(one)
        self._waiting.clear()

    def coming(self) -> Iterator[Offloaded]:
        """What the backward will ask for, from here on."""
        block: BlockInRam | None = self
        while block is not None:
            yield from tuple(block._waiting)
            block = block._before() if block._before is not None else None


class InputsInRam:
    """What a block is called with, the activations among which are in RAM from its forward to its recomputation."""

    def __init__(self, block: BlockInRam, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._block, self._args, self._kwargs = block, list(args), dict(kwargs)
        large = max((value.numel() for value in (*args, *kwargs.values()) if _is_float(value)), default=0)
        places: list[tuple[Any, Any]] = [(self._args, place) for place in range(len(args))]
        places += [(self._kwargs, name) for name in kwargs]
        self._copies = [
            (values, place, copy, value.requires_grad)
            for values, place in places
            if _is_float(value := values[place]) and (value.requires_grad or 2 * value.numel() >= large)
            if (copy := block.leave(value.detach())) is not None
        ]
        self._is_in_ram = False

    @property
    def args(self) -> list[Any]:
        """The positional ones."""
        return self._now(self._args)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The others by name."""
        return self._now(self._kwargs)

    def leave(self) -> None:
        """After the forward: from here on, what is in RAM is brought back for each use."""
        for values, place, _, _ in self._copies:
            values[place] = None
        self._is_in_ram = True

    def _now(self, given: Any) -> Any:
        values = given.copy()
        for into, place, copy, has_gradient in self._copies if self._is_in_ram else ():
            if into is given:
                values[place] = _as_it_was(copy.take(), has_gradient)
        return values


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_it_was(tensor: Tensor | None, has_gradient: bool) -> Tensor:
    """A block's input; it ends the graph of the recomputation, which is there for what the backward needs of it."""
    if tensor is None:
        raise RuntimeError("a block's input was overwritten before its backward: turn activation_offloading off")
    return tensor.requires_grad_(has_gradient)


@dataclass(frozen=True, eq=False)
class _Leaving:
    """A tensor on its way to RAM.

    Attributes:
        one: its copy.
        tensor: itself, of any shape, as its memory must not be used before the copy has ended.
        version: of the tensor when the copy started.
        end: the event that ends the copy.
    """

    one: Offloaded
    tensor: Tensor
    version: int
    end: Any


class Offloading:
    """The copies between a device and RAM during a training, to be closed at its end.

    window: bytes that are in flight at most one way; a larger tensor travels alone.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._pool: HostPool | None = None
        self._stream: Any = None
        self._last: weakref.ref[BlockInRam] | None = None
        self._leaving: deque[_Leaving] = deque()
        self._arriving: dict[int, Offloaded] = {}
        self._known: weakref.WeakSet[Offloaded] = weakref.WeakSet()

    @property
    def held(self) -> int:
        """Bytes of RAM that are held."""
        return self._pool.held if self._pool is not None else 0

    def new_block(self) -> BlockInRam:
        """For the forward of a block, which comes after that of the block that was made before."""
        block = BlockInRam(self, self._last() if self._last is not None else None)
        self._last = weakref.ref(block)
        return block

    def leave(self, block: BlockInRam, tensor: Tensor) -> Offloaded | None:
        """As `BlockInRam.leave`, of any shape."""
        if self._pool is None:
            self._pool = HostPool(is_pinned=tensor.device.type == "cuda")
        host = self._pool.take(tensor)
        if host is None:
            return None
        with torch.no_grad(), self._beside(tensor.device):
            host.copy_(tensor, non_blocking=True)
        one = Offloaded(block, host, tensor.device)
        self._known.add(one)
        self._leaving.append(_Leaving(one, tensor, tensor._version, self._end()))
        while len(self._leaving) > 1 and sum(left.tensor.nbytes for left in self._leaving) > self._window:
            self._let_go()
        return one

    def ahead(self, block: BlockInRam) -> None:
        """As `BlockInRam.ahead`."""
        self._let_all_go()
        coming = sum(one.arriving[0].nbytes for one in self._arriving.values() if one.arriving is not None)
        for one in block.coming():
            if one.arriving is not None or one.host is None:
                continue
            if coming and coming + one.host.nbytes > self._window:
                return
            coming += one.host.nbytes
            self._fetch(one)

    def bring(self, one: Offloaded) -> Tensor | None:
        """The tensor on the device, of any shape; the computing stream waits for it. None as in `Offloaded.take`."""
        self._let_all_go()
        if one.arriving is None:
            self._fetch(one)
        return self.forget(one)

    def forget(self, one: Offloaded) -> Tensor | None:
        """Ends the copy to the device, if there is one, and returns the tensor, of any shape."""
        self._arriving.pop(id(one), None)
        if one.arriving is None:
            return None
        (tensor, end), one.arriving = one.arriving, None
        self._wait_for(end, tensor.device)
        return tensor

    def settle(self) -> None:
        """The computing stream waits for all copies, and their memory on the device is free again."""
        self._let_all_go()
        for one in tuple(self._arriving.values()):
            self.forget(one)

    def close(self) -> None:
        """Waits for the copies and frees all memory, also of a backward that an error has ended."""
        if self._stream is not None:
            self._stream.synchronize()
        self._leaving.clear()
        self._arriving.clear()
        for one in tuple(self._known):
            one.host = one.arriving = None
        if self._pool is not None:
            self._pool.close()
        self._pool = self._stream = None

    def _fetch(self, one: Offloaded) -> None:
        tensor = one.new()
        if tensor is None or one.host is None:
            return
        with torch.no_grad(), self._beside(tensor.device):
            tensor.copy_(one.host, non_blocking=True)
        one.arriving = tensor, self._end()
        self._arriving[id(one)] = one

    def _let_all_go(self) -> None:
        while self._leaving:
            self._let_go()

    def _let_go(self) -> None:
        left = self._leaving.popleft()
        self._wait_for(left.end, left.tensor.device)
        if left.tensor._version != left.version:  # the network has written into it, perhaps before the copy
            left.one.host = None

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """The stream of the copies, which waits for what is computed so far; elsewhere than on CUDA there is none."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def _end(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def _wait_for(self, end: Any, device: torch.device) -> None:
        if end is not None:
            torch.cuda.current_stream(device).wait_event(end)
