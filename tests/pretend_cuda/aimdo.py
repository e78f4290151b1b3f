"""A stand-in for comfy-aimdo on the pretend device: ComfyUI's dynamic VRAM, as hostile as it may be.

comfy-aimdo keeps weights in pages of a range of device addresses. A *fault* brings the pages of one weight and pins
them; unpinned pages may be taken away at any time; where there is no room a fault is refused and the weight goes
through a cast buffer that the next weight reuses. Here pages are small, any fault may evict any unpinned page, and
faults are refused by chance (`chances`), so that a short test meets what a full card does. What leaves a page, and a
cast buffer before each use, holds NaN: whoever kept a view of it computes NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from weakref import WeakSet

from pretend_cuda import device

PAGE = 64 << 10
"""Bytes. comfy-aimdo's are 32 MB; the tests' models are small."""
_CHUNK = 64 << 10
_ALIGNMENT = 512
_POISON = 0xFF


@dataclass(frozen=True)
class Chances:
    """evict: that a fault takes each unpinned page away first. refuse: that a fault finds no room for new pages."""

    evict: float = 0.3
    refuse: float = 0.3


CALM = Chances(0.0, 0.0)
"""Everything is loaded once and stays."""

count: Counter[str] = Counter()
"""Faults, refused ones, evictions, casts, reads of files, and pages unpinned more often than pinned."""

_chances = Chances()
_random = random.Random(0)
_ranges: WeakSet[ModelVBAR] = WeakSet()
_reserved: dict[int, mmap.mmap] = {}  # by address; tensors over freed ranges may live on, so addresses stay valid

Allocation = tuple[Any, int, int]
"""Its range or buffer, address, bytes."""


@contextmanager
def chances(chosen: Chances) -> Iterator[None]:
    """Inside, evictions and refusals happen this often."""
    global _chances
    before, _chances = _chances, chosen
    try:
        yield
    finally:
        _chances = before


def still_pinned() -> int:
    """Pages that were pinned and not unpinned."""
    return sum(vbar.pinned() for vbar in _ranges)


def resident_bytes(_: object = None) -> int:
    """Of all models."""
    return sum(vbar.loaded_size() for vbar in _ranges)


def _reserve(size: int) -> int:
    """The address of `size` bytes that take no memory until they are written."""
    whole = max(int(size), PAGE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return _kept(mmap.mmap(-1, whole, flags=flags))


def _kept(memory: mmap.mmap) -> int:
    """Its address."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _reserved[address] = memory
    return address


def _give_back(address: int) -> None:
    """The host has its memory again; the addresses stay."""
    _reserved[address].madvise(mmap.MADV_DONTNEED)


def _read(file: int | BinaryIO, offset: int, size: int, *addresses: int) -> None:
    count["read"] += 1
    data = os.pread(file if isinstance(file, int) else file.fileno(), int(size), int(offset))
    for address in addresses:
        ctypes.memmove(int(address), data, len(data))


class ModelVBAR:
    """The range of addresses of one model's weights."""

    def __init__(self, size: int, device: int) -> None:
        self.max_size, self.device, self.offset = int(size), device, 0
        self.base_addr = _reserve(self.max_size + PAGE)
        self._resident: set[int] = set()
        self._pins: Counter[int] = Counter()
        self._generation: Counter[int] = Counter()  # a page that came back has another, so its contents are known stale
        _ranges.add(self)

    def alloc(self, num_bytes: int) -> Allocation:
        """A place for one weight.

        Raises:
            MemoryError: the range is full.
        """
        start = -(-self.offset // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > self.max_size:
            raise MemoryError("VBAR OOM")
        self.offset = start + num_bytes
        return self, self.base_addr + start, num_bytes

    def fault(self, address: int, size: int) -> Any:
        """Brings and pins the pages: their generations, or None where there was no room."""
        count["fault"] += 1
        for vbar in list(_ranges):
            vbar._evict_by_chance()
        pages = self._pages(address, size)
        missing = [page for page in pages if page not in self._resident]
        if missing and (_random.random() < _chances.refuse or self._is_full(len(missing))):
            count["refused"] += 1
            return None
        for page in missing:
            self._resident.add(page)
            self._generation[page] += 1
            device.add_live(PAGE)
        self._pins.update(pages)
        return (ctypes.c_uint32 * len(pages))(*(self._generation[page] for page in pages))

    def unpin(self, address: int, size: int) -> None:
        count["unpin"] += 1
        for page in self._pages(address, size):
            if self._pins[page] <= 0:
                count["unpinned too often"] += 1
            else:
                self._pins[page] -= 1

    def free_memory(self, size: int) -> int:
        """Evicts until so many bytes are free; returns how many are."""
        before = self.loaded_size()
        for page in list(self._resident):
            if before - self.loaded_size() >= size:
                break
            self._evict(page)
        return before - self.loaded_size()

    def _pages(self, address: int, size: int) -> range:
        start = address - self.base_addr
        return range(start // PAGE, (start + max(size, 1) - 1) // PAGE + 1)

    def _is_full(self, more: int) -> bool:
        now = device.counts()
        return now.live_bytes + more * PAGE > min(now.limit_bytes, device.total_memory())

    def _evict_by_chance(self) -> None:
        for page in list(self._resident):
            if _random.random() < _chances.evict:
                self._evict(page)

    def _evict(self, page: int) -> None:
        if not self._pins[page]:
            self._drop(page)
            count["evicted"] += 1

    def _drop(self, page: int) -> None:
        self._resident.remove(page)
        ctypes.memset(self.base_addr + page * PAGE, _POISON, PAGE)
        device.add_live(-PAGE)

    def __del__(self) -> None:
        for page in list(self._resident):
            self._drop(page)
        _give_back(self.base_addr)

    def pinned(self) -> int:
        return sum(1 for pins in self._pins.values() if pins)

    def loaded_size(self) -> int:
        return len(self._resident) * PAGE

    def get_nr_pages(self) -> int:
        return -(-self.offset // PAGE)

    def get_residency(self) -> list[int]:
        return [(page in self._resident) | (bool(self._pins[page]) << 1) for page in range(self.get_nr_pages())]

    def get_watermark(self) -> int:
        return self.get_nr_pages()

    def prioritize(self) -> None: ...

    def deprioritize(self) -> None: ...

    def set_watermark_limit(self, size_bytes: int) -> None: ...

    def set_watermark(self, size_bytes: int) -> None: ...


class VRAMBuffer:
    """A cast buffer, shared by all weights that were refused."""

    def __init__(self, max_size: int, device: int) -> None:
        self.max_size, self.device, self._allocated = max_size, device, 0
        self.base_addr = _reserve(max_size)

    def size(self) -> int:
        return self._allocated

    def get(self, size: int, offset: int = 0) -> Allocation:
        """Bytes [offset, offset + size); a new use starts at offset 0."""
        count["cast"] += 1
        needed = int(size) + int(offset)
        if needed > self._allocated:
            whole = -(-needed // _CHUNK) * _CHUNK
            device.add_live(whole - self._allocated)
            self._allocated = whole
        if not offset:
            ctypes.memset(self.base_addr, _POISON, self._allocated)
        return self, self.base_addr + int(offset), int(size)

    def __del__(self) -> None:
        device.add_live(-self._allocated)
        _give_back(self.base_addr)


class HostBuffer:
    """Page-locked memory of the host that grows in place."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self.size = 0
        self._capacity = max(int(size), int(max_grow_size))
        self._address = _reserve(self._capacity)
        if size:
            self.extend(size)

    def get_raw_address(self) -> int:
        return self._address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + int(size) > self._capacity:
            raise RuntimeError("HostBuffer.extend failed")
        self.size += int(size)
        if register and self.size:
            device.pin(self._address, self.size)
        return self._address

    def read_file_slice(
        self, file_obj: Any, file_offset: int, size: int, offset: int = 0, stream: int = 0, device_ptr: int = 0,
        device: int = -1,
    ) -> None:  # fmt: skip
        addresses = [self._address + int(offset), *([device_ptr] if device_ptr else [])]
        _read(file_obj, file_offset, size, *addresses)
        self.size = max(self.size, int(offset) + int(size))

    def register(self, offset: int, size: int) -> None: ...

    def unregister(self, offset: int) -> None: ...

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = int(size)

    def __del__(self) -> None:
        device.unpin(self._address)
        _give_back(self._address)


def nothing(*_: object) -> None:
    """For what has no counterpart here."""


def read_file_to_device(
    file_obj: Any, file_offset: int, size: int, stream: int, device_ptr: int, device: int, mark_cold: bool = True
) -> None:
    _read(file_obj, file_offset, size, device_ptr)


class ModelMMAP:
    """A file in the host's memory, changes to which stay there."""

    def __init__(self, filepath: Any) -> None:
        with open(filepath, "rb") as file:
            self._file = os.dup(file.fileno())
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        self._address = _kept(self._map)

    def get(self) -> int:
        return self._address

    def get_file_handle(self) -> int:
        return self._file

    def bounce(self) -> bool:
        return True


def install() -> None:
    """Puts the stand-in into the installed package. ComfyUI switches it on as it does the real one."""
    import comfy_aimdo.control as control
    import comfy_aimdo.host_buffer as host_buffer
    import comfy_aimdo.model_mmap as model_mmap
    import comfy_aimdo.model_vbar as model_vbar
    import comfy_aimdo.torch as aimdo_torch
    import comfy_aimdo.vram_buffer as vram_buffer

    from pretend_cuda.torch_cuda import from_address

    replaced: tuple[tuple[Any, dict[str, Any]], ...] = (
        (control, {"init": lambda *_, **__: True, "init_devices": lambda ids: bool(list(ids))}),
        (control, {"get_total_vram_usage": resident_bytes, "analyze": nothing}),
        (control, {name: nothing for name in vars(control) if name.startswith("set_log_")}),
        (model_vbar, {"ModelVBAR": ModelVBAR, "vbars_analyze": resident_bytes}),
        (model_vbar, {"vbars_reset_watermark_limits": nothing}),
        (vram_buffer, {"VRAMBuffer": VRAMBuffer}),
        (host_buffer, {"HostBuffer": HostBuffer, "read_file_to_device": read_file_to_device}),
        (host_buffer, {"cleanup_file_reader": nothing}),
        (model_mmap, {"ModelMMAP": ModelMMAP}),
        (aimdo_torch, {"aimdo_to_tensor": lambda allocation, _: from_address(allocation[1], allocation[2])}),
    )
    for module, values in replaced:
        for name, value in values.items():
            setattr(module, name, value)
