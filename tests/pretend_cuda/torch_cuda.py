"""torch.cuda for the pretend device: what a CPU build of torch lacks in Python.

There is one card and one order of work: streams and events exist and order nothing, as everything is done when it is
called. Waiting for one is counted.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pretend_cuda import device

CUDA_VERSION, CUDNN_VERSION, RUNTIME_VERSION = "12.8", 91900, 12080
NAME = "NVIDIA GeForce RTX Pretend"

_stream_numbers = itertools.count(1)
_thread = threading.local()


class Stream:
    """A stream of work; `with` makes it the thread's current one."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.device_index, self.device_type = torch.device("cuda", 0), 0, 1
        self.stream_id, self.cuda_stream, self.priority = next(_stream_numbers), 0, priority
        self._before: list[Stream] = []

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        device.sync("stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        self._before.append(current_stream())
        _thread.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.stream = self._before.pop()


class Event:
    """A point of a stream's work."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        device.sync("event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 0.0


_DEFAULT_STREAM = Stream()


def current_stream(_: Any = None) -> Stream:
    return getattr(_thread, "stream", _DEFAULT_STREAM)


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    with chosen or contextlib.nullcontext():
        yield


class Device:
    """torch.cuda.device and device_of: there is one."""

    def __init__(self, _: Any) -> None:
        self.idx = self.prev_idx = 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None: ...


class Properties(types.SimpleNamespace):
    """Of a card of $PRETEND_CUDA_CAPABILITY and $PRETEND_CUDA_MEMORY."""


def properties(_: Any = None) -> Properties:
    major, minor = device.capability()
    return Properties(
        name=NAME, major=major, minor=minor, total_memory=device.total_memory(), multi_processor_count=64,
        gcnArchName="", is_integrated=0, is_multi_gpu_board=0, uuid="pretend", L2_cache_size=2**26, warp_size=32,
        max_threads_per_multi_processor=1536, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
        shared_memory_per_block_optin=101376, shared_memory_per_multiprocessor=102400,
    )  # fmt: skip


class Runtime:
    """torch.cuda.cudart(), of which ComfyUI uses the pinning of memory."""

    cudaError = types.SimpleNamespace(success=0)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        device.pin(address, size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        device.unpin(address)
        return 0

    def cudaMemGetInfo(self, _: int) -> tuple[int, int]:
        return mem_get_info()

    def cudaGetErrorString(self, error: int) -> str:
        return f"pretend error {error}"


def mem_get_info(*_: Any, **__: Any) -> tuple[int, int]:
    """Free and total bytes."""
    total = device.total_memory()
    return total - device.counts().live_bytes, total


def memory_stats(*_: Any, **__: Any) -> dict[str, int]:
    now = device.counts()
    statistics: dict[str, int] = collections.defaultdict(int)
    for kind in ("active", "reserved", "allocated"):
        statistics[f"{kind}_bytes.all.current"] = now.live_bytes
        statistics[f"{kind}_bytes.all.peak"] = now.peak_bytes
    return statistics


def memory_summary(*_: Any, **__: Any) -> str:
    """What ComfyUI logs after it ran out of memory."""
    return str(device.counts())


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _call(function: Callable[[], Any], **_: Any) -> None:
    function()


def install() -> None:
    """Puts all of this into torch."""
    version: Any = torch.version
    version.cuda = CUDA_VERSION
    _set(torch.cuda, {**_about_the_card(), **_about_memory(), **_about_order(), **_about_chance()})
    statistics = {"mem_get_info": mem_get_info, "memory_stats": memory_stats, "memory_summary": memory_summary}
    _set(torch.cuda.memory, statistics)
    _set(torch.cuda.streams, {"Stream": Stream, "Event": Event})
    _set(torch._C, _of_the_library())
    _set(torch.backends.cudnn, {"version": _always(CUDNN_VERSION), "is_available": _always(True)})
    if hasattr(torch, "accelerator"):  # pinned memory is freed at once, none is cached
        _set(torch.accelerator, {"empty_host_cache": _always(None)})


def _set(module: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _about_the_card() -> dict[str, Any]:
    capability = device.capability()

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return capability >= (8, 0) or including_emulation

    return {
        "is_available": _always(True), "is_initialized": _always(True), "init": _always(None),
        "_lazy_init": _always(None),
        "_is_compiled": _always(True), "_is_in_bad_fork": _always(False), "_lazy_call": _call,
        "device_count": _always(1), "_device_count_nvml": _always(1), "current_device": _always(0),
        "set_device": _always(None),
        "device": Device, "device_of": Device, "get_device_properties": properties, "get_device_name": _always(NAME),
        "get_device_capability": _always(capability), "get_arch_list": _always(["sm_{}{}".format(*capability)]),
        "is_bf16_supported": is_bf16_supported, "cudart": Runtime,
    }  # fmt: skip


def _about_memory() -> dict[str, Any]:
    def live(*_: Any, **__: Any) -> int:
        return device.counts().live_bytes

    def peak(*_: Any, **__: Any) -> int:
        return device.counts().peak_bytes

    def reset_peak(*_: Any, **__: Any) -> None:
        device.reset()

    return {
        "mem_get_info": mem_get_info, "memory_stats": memory_stats, "memory_summary": memory_summary,
        "memory_allocated": live, "memory_reserved": live,
        "max_memory_allocated": peak, "max_memory_reserved": peak, "reset_peak_memory_stats": reset_peak,
        "empty_cache": _always(None), "ipc_collect": _always(None), "get_allocator_backend": _always("native"),
    }  # fmt: skip


def _about_order() -> dict[str, Any]:
    def synchronize(_: Any = None) -> None:
        device.sync("torch.cuda.synchronize")

    return {
        "Stream": Stream, "Event": Event, "stream": stream, "current_stream": current_stream,
        "default_stream": _always(_DEFAULT_STREAM), "synchronize": synchronize,
        "is_current_stream_capturing": _always(False),
    }  # fmt: skip


def _about_chance() -> dict[str, Any]:
    def state(_: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    return {
        "manual_seed": _always(None), "manual_seed_all": _always(None), "get_rng_state": state,
        "set_rng_state": _always(None), "get_rng_state_all": lambda: [state()], "set_rng_state_all": _always(None),
    }  # fmt: skip


def _of_the_library() -> dict[str, Any]:
    return {
        "_cuda_getDevice": _always(0), "_cuda_setDevice": _always(None), "_cuda_getDeviceCount": _always(1),
        "_cuda_init": _always(None), "_cuda_exchangeDevice": _always(0), "_cuda_maybeExchangeDevice": _always(0),
        "_cuda_isCurrentStreamCapturing": _always(False), "_cuda_is_jiterator_enabled": _always(False),
        "_cuda_getCompiledVersion": _always(RUNTIME_VERSION), "_cuda_getDriverVersion": _always(RUNTIME_VERSION),
        "_cuda_synchronize": lambda: device.sync("torch.cuda.synchronize"), "_cuda_getCurrentRawStream": _always(0),
        "_CudaDeviceProperties": Properties, "_cuda_clearCublasWorkspaces": _always(None),
    }  # fmt: skip


def from_address(address: int, size: int) -> torch.Tensor:
    """[size] bytes of the host's memory at `address`, as a tensor on the device."""
    return torch.ops.pretend_cuda.from_address(address, size)
