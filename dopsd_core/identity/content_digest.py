"""A digest of any Python value by its contents: equal across processes, and different if the value may act differently.

The options of a model can contain anything: numbers, tensors, functions of custom nodes with their closures, objects of
their classes. All of these are read. A value that cannot be read (a lock, an open file, an object of an extension) gets
a unique digest, so that it never equals another, and its type is listed in `Digester.unknown`.

Addresses, hash() and the order of sets have no influence. Devices and UUIDs are ignored.
"""

from __future__ import annotations

import datetime
import dis
import enum
import functools
import hashlib
import logging
import os
import pathlib
import re
import struct
import types
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .tensor_digest import Content, digest_tensors

log = logging.getLogger("dopsd")

_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8  # CPython's type flags: made by a class statement; of an extension
_OF_MODULES = frozenset(vars(nn.Module()))
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__slots__"}
_OF_CLASSES |= {"__firstlineno__", "__static_attributes__", "__parameters__", "_abc_impl", "__abstractmethods__"}
_OF_CLASSES |= {"__annotate_func__", "__annotations_cache__"}

_WRITTEN_OUT = (torch.dtype, torch.layout, torch.memory_format, range, slice, re.Pattern)
_WRITTEN_OUT += (types.UnionType, types.GenericAlias, datetime.date, datetime.time, datetime.timedelta)
_SETTINGS = (bool, int, float, complex, str, bytes, tuple, enum.Enum, torch.dtype, Tensor)
"""Types of global values that decide what a function does; lists and dicts may be caches, which change."""
_WITHOUT_SETTINGS = frozenset(("comfy", "comfy_extras", "comfy_api", "torch"))
_POINTER = struct.calcsize("P")
_CACHED_FUNCTION = type(functools.lru_cache(lambda: None))

Substitute = Callable[[Any], Any]
"""Returns what to digest in place of an object, or the object itself."""


class Digester:
    """Digests values, each object once.

    Args:
        substitute: replaces the host's own objects; called for every object before it is read.
        is_state: whether an attribute of a module, by its name, is transient state (loaded, patched), to be ignored.

    Attributes:
        unknown: names of the types that could not be read.
    """

    def __init__(
        self, substitute: Substitute = lambda value: value, is_state: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._substitute, self._is_state = substitute, is_state
        self._known: dict[int, tuple[Any, bytes]] = {}  # by id, with the object, so that no other gets its id
        self._inside: dict[int, int] = {}
        self.unknown: dict[str, None] = {}

    def digest(self, value: Any) -> str:
        """The digest as 64 hex digits."""
        return self.of(value).hex()

    def of(self, value: Any) -> bytes:
        """The digest as 32 bytes."""
        if (known := self._known.get(id(value))) is not None:
            return known[1]
        if id(value) in self._inside:  # a cycle: digest how many levels it refers back
            return _hash(f"cycle {len(self._inside) - self._inside[id(value)]}".encode())
        self._inside[id(value)] = len(self._inside)
        try:
            if (plain := _plain(value)) is not None:
                return _hash(plain)
            counted = self._substitute(value)
            result = self._read(value) if counted is value else self.of(counted)
        except Exception as error:  # reading an object runs its code, which can fail in any way
            log.debug("a %s cannot be read: %r", name_of(type(value)), error)
            result = self._unique(value)
        finally:
            del self._inside[id(value)]
        self._known[id(value)] = value, result
        return result

    def _read(self, value: Any) -> bytes:
        for kinds, read in self._readers:
            if isinstance(value, kinds):
                return read(self, value)
        return self._object(value)

    def _unique(self, value: Any) -> bytes:
        self.unknown[name_of(type(value))] = None
        return os.urandom(32)

    def _joined(self, kind: str, parts: Iterable[bytes]) -> bytes:
        return _hash(kind.encode() + b"|" + b"".join(parts))

    def _named(self, values: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
        for name, value in sorted(values, key=lambda item: str(item[0])):
            yield self.of(name) + self.of(value)

    # -- collections --------------------------------------------------------------------------------------------------

    def _mapping(self, value: Mapping[Any, Any]) -> bytes:
        parts = [self.of(key) + self.of(item) for key, item in value.items()]
        return self._joined(_kind(value, dict), [*parts, *self._rest(value)])

    def _sequence(self, value: Any) -> bytes:
        kind = _kind(value, list, tuple, deque)
        return self._joined(f"{kind} {len(value)}", [*map(self.of, value), *self._rest(value)])

    def _number(self, value: Any) -> bytes:
        """Instances of subclasses of str, int, float and bytes."""
        bases: tuple[Any, ...] = (str, int, float, bytes)
        base = next(kind for kind in bases if isinstance(value, kind))
        return self._joined(name_of(type(value)), [self.of(base(value)), *self._rest(value)])

    def _set(self, value: Any) -> bytes:
        return self._joined(_kind(value, set, frozenset), sorted(map(self.of, value)))

    def _rest(self, value: Any) -> Iterator[bytes]:
        """Attributes of an instance of a subclass of a collection."""
        return self._named(vars(value).items()) if hasattr(value, "__dict__") else iter(())

    # -- tensors and networks -----------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> bytes:
        if type(value) not in (Tensor, nn.Parameter):
            return self._tensor_of_a_kind(value)
        return next(digest_tensors([Content(value)]))

    def _tensor_of_a_kind(self, value: Any) -> bytes:
        """A subclass of Tensor: its raw storage and its attributes, or its inner tensors."""
        if hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            inner = {name: getattr(value, name) for name in names}
            return self._joined(f"tensor {name_of(type(value))}", [self.of(inner), self.of(context)])
        raw, facts = value.as_subclass(Tensor), {**vars(value), "__class__": type(value)}
        return self._joined("tensor", [*digest_tensors([Content(raw)]), *self._named(facts.items())])

    def _module(self, value: nn.Module) -> bytes:
        names = vars(value).keys() - _OF_MODULES
        own = {name: vars(value)[name] for name in sorted(names) if not self._is_state(name)}
        buffers = {n: b for n, b in value._buffers.items() if n not in value._non_persistent_buffers_set}
        hooks = [*value._forward_pre_hooks.values(), *value._forward_hooks.values()]
        parts = (type(value), own, dict(value._parameters), buffers, dict(value._modules), hooks)
        return self._joined("module", map(self.of, parts))

    # -- code ---------------------------------------------------------------------------------------------------------

    def _function(self, value: types.FunctionType) -> bytes:
        cells = [_cell(cell) for cell in value.__closure__ or ()]
        parts: tuple[Any, ...] = (value.__defaults__, value.__kwdefaults__, cells, vars(value))
        if used := _globals_of(value):
            parts += (used,)
        return self._joined(f"function {name_of(value)}", [self._code(value.__code__), *map(self.of, parts)])

    def _code(self, code: types.CodeType) -> bytes:
        constants = [self._code(c) if isinstance(c, types.CodeType) else self.of(c) for c in code.co_consts]
        names = (code.co_names, code.co_freevars, code.co_cellvars, code.co_argcount, code.co_kwonlyargcount)
        return self._joined("code", [_hash(code.co_code), self.of((*names, code.co_flags)), *constants])

    def _method(self, value: types.MethodType) -> bytes:
        return self._joined("method", [self.of(value.__func__), self.of(value.__self__)])

    def _builtin(self, value: Any) -> bytes:
        owner = getattr(value, "__self__", None)
        parts = [] if owner is None or isinstance(owner, types.ModuleType) else [self.of(owner)]
        return self._joined(f"builtin {name_of(value)}", parts)

    def _partial(self, value: functools.partial) -> bytes:
        return self._joined("partial", [self.of(value.func), self.of(value.args), self.of(value.keywords)])

    def _class(self, value: type) -> bytes:
        """A class by its name; one defined inside a function by its contents."""
        if "<locals>" not in value.__qualname__:
            return _hash(f"class {name_of(value)}".encode())
        own = [(name, item) for name, item in vars(value).items() if name not in _OF_CLASSES]
        return self._joined(f"class {name_of(value)}", [*map(self.of, value.__bases__), *self._named(own)])

    def _descriptor(self, value: Any) -> bytes:
        whole = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value.__func__,)
        return self._joined(type(value).__name__, map(self.of, whole))

    # -- objects ------------------------------------------------------------------------------------------------------

    def _enum(self, value: enum.Enum) -> bytes:
        return _hash(f"enum {name_of(type(value))}.{value.name}".encode())

    def _array(self, value: np.ndarray) -> bytes:
        if value.dtype.hasobject:
            return self._joined(f"array {value.shape}", map(self.of, value.ravel()))
        return _hash(f"array {value.shape} {value.dtype}|".encode() + value.tobytes())

    def _generator(self, value: torch.Generator) -> bytes:
        return self._joined("generator", digest_tensors([Content(value.get_state())]))

    def _cached(self, value: Any) -> bytes:
        return self._joined("cached", [self.of(value.__wrapped__)])

    def _namespace(self, value: types.SimpleNamespace) -> bytes:
        return self._joined("namespace", self._named(vars(value).items()))

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if not _is_readable(value):
            return self._unique(value)
        slots = [name for base in kind.__mro__ for name in _slots(base) if hasattr(value, name)]
        own = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
        return self._joined("object", [self.of(kind), *self._named(own.items())])

    _readers: tuple[tuple[Any, Callable[[Any, Any], bytes]], ...] = (
        (enum.Enum, _enum),
        (Tensor, _tensor),
        (nn.Module, _module),
        (type, _class),
        (types.FunctionType, _function),
        (types.MethodType, _method),
        ((types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType), _builtin),
        ((types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType), _builtin),
        (functools.partial, _partial),
        ((property, staticmethod, classmethod), _descriptor),
        (_CACHED_FUNCTION, _cached),
        (np.ndarray, _array),
        (torch.Generator, _generator),
        (types.SimpleNamespace, _namespace),
        ((dict, types.MappingProxyType), _mapping),
        ((list, tuple, deque), _sequence),
        ((set, frozenset), _set),
        ((str, int, float, bytes), _number),
    )


def name_of(value: Any) -> str:
    """Module and name of a class or function, without the folder if the module was loaded from a path."""
    module = str(getattr(value, "__module__", "")).replace("\\", "/").rpartition("/")[2]
    for now, then in _MOVED.items():
        if module == now or module.endswith(f".{now}"):
            module = module.removesuffix(now) + then
    return f"{module}.{getattr(value, '__qualname__', type(value).__name__)}"


_MOVED: Mapping[str, str] = {
    "nodes.comfy_host.demo_models": "nodes.demo_models",
    "dopsd_core.demo.autoencoder": "dopsd_core.standalone.autoencoder",
}
"""Modules whose classes occur in the digests of saved runs, and their former names, so that these runs still resume."""


# -- what needs no reading ---------------------------------------------------------------------------------------------


def _plain(value: Any) -> bytes | None:
    """The bytes of a simple value; None for others."""
    kind = type(value)
    if value is None or value is ... or kind is bool or kind is int or kind is complex:
        return f"{kind.__name__} {value!r}".encode()
    if kind is float:
        return b"float " + struct.pack("<d", value)
    if kind is str:
        return b"str " + value.encode(errors="surrogatepass")
    if kind in (bytes, bytearray):
        return b"bytes " + bytes(value)
    if isinstance(value, (torch.device, uuid.UUID)):
        return name_of(kind).encode()
    if isinstance(value, _WRITTEN_OUT):
        return f"{kind.__name__} {value!r}".encode()
    if isinstance(value, pathlib.PurePath):
        return f"path {value}".encode(errors="surrogateescape")
    if isinstance(value, np.generic):
        return f"{value.dtype} ".encode() + value.tobytes()
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}".encode(errors="surrogateescape")
    if isinstance(value, logging.Logger):
        return b"logger"
    return None


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The plain values that a function reads from its module, by name.

    Without those that it writes, such as counters, and without those of ComfyUI and torch, which are no settings.
    """
    if function.__module__ is None or function.__module__.partition(".")[0] in _WITHOUT_SETTINGS:
        return {}
    read, written, codes = set[str](), set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        steps = list(dis.get_instructions(code))
        read |= {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        written |= {step.argval for step in steps if step.opname == "STORE_GLOBAL"}
    found = {name: function.__globals__[name] for name in sorted(read - written) if name in function.__globals__}
    return {name: value for name, value in found.items() if isinstance(value, _SETTINGS)}


def _cell(cell: Any) -> Any:
    try:
        return (cell.cell_contents,)
    except ValueError:  # nothing in it yet
        return ()


def _kind(value: Any, *usual: type) -> str:
    return type(value).__name__ if type(value) in usual else name_of(type(value))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    hidden = [f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return tuple(name for name in hidden if name not in ("__dict__", "__weakref__"))


def _is_readable(value: Any) -> bool:
    """Whether the attributes of an object are its entire state.

    False for objects of extensions: their classes are not created by a class statement, or have additional storage.
    """
    kinds = [kind for kind in type(value).__mro__ if kind is not object]
    if any(not kind.__flags__ & _HEAP_TYPE or kind.__flags__ & _IMMUTABLE_TYPE for kind in kinds):
        return False
    room = object.__basicsize__ + _POINTER * (2 + sum(len(_slots(kind)) for kind in kinds))
    if type(value).__basicsize__ > room or type(value).__itemsize__:
        return False
    return not kinds or hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in kinds)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
