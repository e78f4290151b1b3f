"""A digest of the weights that a loader has loaded into a ModelPatcher's network: by content, wherever they are now.

ComfyUI moves weights, streams them, casts some and overwrites others with patched values. The values read here are
those that were loaded: from ComfyUI's backups if a clone has overwritten them, and in the dtype of the network if
ComfyUI keeps the file's wider one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.weight_adapter
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...dopsd_core.files.atomic import write_atomic
from ...dopsd_core.identity.content_digest import Digester, name_of
from ...dopsd_core.identity.tensor_digest import WHOLE_BYTES, Content, digest_tensors
from .paths import known_weights, stamp_of

log = logging.getLogger("dopsd")

_FORMAT = "dopsd-weights-1"
_MOST_REMEMBERED = 200
_DECIDING = ("quant_format", "layout_type", "_full_precision_mm", "dequant_dtype", "patch_dtype")
"""Attributes that change what a layer computes from its weights: ComfyUI's quantised layers, ComfyUI-GGUF's."""

_OF_TEXT_ENCODERS = ("config", "options_default", "special_tokens", "layer_norm_hidden_state", "zero_out_masked")


class LoadedWeights:
    """The layers of a ModelPatcher's network in order, with the weights that were loaded.

    Attributes:
        names: the name of each layer by its id().
    """

    def __init__(self, patcher: Any) -> None:
        self.names: dict[int, str] = {}
        self._patcher = patcher
        self._own, self._objects = patcher.object_patches, patcher.object_patches_backup
        self._facts: list[tuple[Any, ...]] = []
        self._contents: list[Content] = []
        self._visit(patcher.model, "")

    def digest(self, digester: Digester) -> str:
        """64 hex digits of the layers and their weights, without patches.

        Args:
            digester: reads everything that is not a tensor: quantisation, replaced functions of layers.
        """
        facts = digester.digest(self._facts)
        key = _file_key(self._patcher, self._contents, facts)
        if key is not None and (known := _DigestCache.load().get(key)) is not None:
            return known
        whole = hashlib.sha256(facts.encode())
        for digest in digest_tensors(self._contents):
            whole.update(digest)
        if key is not None:
            _DigestCache.keep(key, whole.hexdigest())
        return whole.hexdigest()

    def _visit(self, module: nn.Module, path: str) -> None:
        """Visits the module and its children; for an object that a patch has replaced, the original."""
        if id(module) in self.names:
            return
        self.names[id(module)] = path
        self._facts.append((path, name_of(type(module)), *self._deciding(module), *self._overrides(module, path)))
        for name, parameter in module._parameters.items():
            self._tensor(_joined(path, name), self._original(_joined(path, name), parameter), _dtype(module, name))
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set:
                key = _joined(path, name)
                value = None if key in self._own else self._patcher.backup_buffers.get(key, buffer)
                self._tensor(key, value, _dtype(module, name))
        for name, child in module._modules.items():
            key = _joined(path, name)
            child = self._objects.get(key, child)
            if key not in self._own and key != READ_WHOLE and isinstance(child, nn.Module):
                self._visit(child, key)

    def _original(self, key: str, loaded: Tensor | None) -> Tensor | None:
        if key in self._own:
            return None
        if key in self._patcher.backup:
            return self._patcher.backup[key].weight
        if key in self._patcher.hook_backup:
            return self._patcher.hook_backup[key][0]
        return self._objects.get(key, loaded)

    def _tensor(self, key: str, value: Any, dtype: torch.dtype | None) -> None:
        if value is None:
            return
        if isinstance(value, QuantizedTensor):
            fields = {field.name: getattr(value._params, field.name) for field in dataclasses.fields(value._params)}
            inner = {"": value._qdata, **{n: f for n, f in fields.items() if isinstance(f, Tensor)}}
            plain = {name: field for name, field in fields.items() if not isinstance(field, Tensor)}
            self._facts.append((key, value._layout_cls, plain, list(inner)))
            self._contents += [Content(tensor.as_subclass(Tensor)) for tensor in inner.values()]
        elif hasattr(value, "tensor_type"):  # ComfyUI-GGUF: bytes, and how to read them
            self._facts.append((key, str(value.tensor_type), tuple(value.shape)))
            self._contents.append(Content(value.as_subclass(Tensor)))
        elif value.is_meta:  # missing in the file: ComfyUI uses zeros
            self._facts.append((key, "zeros", tuple(value.shape)))
        else:
            self._facts.append((key,))
            self._contents.append(Content(value.as_subclass(Tensor), dtype))

    def _deciding(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        for name in (*_DECIDING, *_OF_TEXT_ENCODERS):
            if (value := getattr(module, name, None)) is not None and not isinstance(value, nn.Module):
                yield name, value

    def _overrides(self, module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
        """Functions that replace the module's own, without those of patches, which are read with the patches."""
        for name, value in vars(module).items():
            key = _joined(path, name)
            value = self._objects.get(key, value)
            if key not in self._own and isinstance(value, _FUNCTIONS) and not _is_usual(module, name, value):
                yield name, value
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield "hook", hook


READ_WHOLE = "model_sampling"
"""Its attributes decide what it computes; they are read with the network's."""

_FUNCTIONS = (types.FunctionType, types.MethodType)


def _is_usual(module: nn.Module, name: str, value: Any) -> bool:
    """Whether it is the class's own method, left in the instance by unpatching, or a bypass LoRA's, read elsewhere."""
    if isinstance(value, types.MethodType):
        own = value.__self__ is module and value.__func__ is getattr(type(module), name, None)
        return own or isinstance(value.__self__, comfy.weight_adapter.BypassForwardHook)
    return False


def _dtype(module: nn.Module, name: str) -> torch.dtype | None:
    """The dtype that ComfyUI computes with: the file's dtype may be wider, and is kept until the weight is used."""
    return getattr(module, f"{name}_comfy_model_dtype", None)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# -- cached by file ----------------------------------------------------------------------------------------------------


def _file_key(patcher: Any, contents: Sequence[Content], facts: str) -> str | None:
    """The key of a cached digest: the files' sizes and times, and a sample of the weights.

    None if the weights could have been overwritten since: only those of a mapped file cannot.
    """
    stamps = [stamp_of(path) for path in loaded_from(patcher)]
    large = [c.tensor for c in contents if c.tensor.numel() * c.tensor.element_size() > WHOLE_BYTES]
    if not stamps or not large or not all(map(_is_mapped, large)):
        return None
    glance = b"".join(digest_tensors(contents, glance=True)).hex()
    return hashlib.sha256(repr((_FORMAT, stamps, facts, glance)).encode(errors="surrogateescape")).hexdigest()


def loaded_from(patcher: Any) -> list[Path]:
    """The files that a loader node loaded the patcher's network from; none if the loader does not record them."""
    made_by = getattr(patcher, "cached_patcher_init", None)
    return [Path(text) for text in _texts(made_by[1] if made_by else ()) if os.path.isfile(text)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _is_mapped(tensor: Tensor) -> bool:
    """Whether it is a memory-mapped file, which nothing can write to; ComfyUI's loader marks those."""
    return tensor.device.type == "cpu" and hasattr(tensor.untyped_storage(), "_comfy_tensor_file_slice")


class _DigestCache:
    """The cache of digests, which persists over restarts."""

    @staticmethod
    def load() -> dict[str, str]:
        """All cached digests; none if the file cannot be read."""
        try:
            known = json.loads(known_weights().read_bytes())
            return {str(key): str(value) for key, value in known.items()}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    @classmethod
    def keep(cls, key: str, digest: str) -> None:
        """Adds one and drops the oldest. A failure to write is only logged: it costs time, not the run."""
        known = [*cls.load().items(), (key, digest)][-_MOST_REMEMBERED:]
        try:
            known_weights().parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known_weights(), json.dumps(dict(known), indent=1).encode())
        except OSError as error:
            log.warning("%s cannot be written (%s); weights will be read again next time", known_weights(), error)
