"""The identity of a MODEL, CLIP, VAE or vision tower: a digest of everything that decides what it computes.

A run is resumed, and a condition read from the cache, only if its identity is the same. Where ComfyUI keeps the weights
(loaded or not, half in RAM, another clone loaded) does not change it. `identity_table.py` lists what counts. Attributes
that it does not list do count: one that a later ComfyUI or another node pack adds starts a new run, never a wrong one.
"""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.sd
import comfy.supported_models_base
import comfy.weight_adapter
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...dopsd_core.identity.content_digest import Digester, name_of
from .identity_table import TABLE
from .vision import TeacherVision
from .weights import LoadedWeights

log = logging.getLogger("dopsd")

HEX_DIGITS = 16


@dataclass(frozen=True)
class Identity:
    """The identity of one or several values.

    Attributes:
        digest: hex digits, equal for values that compute the same.
        unknown: kinds of objects inside that cannot be compared; if there are any, the digest is new each time.
    """

    digest: str
    unknown: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for the user, if anything cannot be compared."""
        if not self.unknown:
            return ()
        kinds = ", ".join(self.unknown)
        return (f"patches on MODEL, CLIP or VAE contain {kinds}, which cannot be compared: no run can be resumed",)


def identity_of(*values: Any) -> Identity:
    """The identity of ModelPatchers (MODEL), CLIPs, VAEs and vision towers together; logs what cannot be compared."""
    reader = _ObjectReader()
    found = Identity(reader.digester.digest(values)[:HEX_DIGITS], tuple(reader.digester.unknown))
    for note in found.notes:
        log.warning(note)
    return found


def fingerprint(value: Any) -> str:
    """The digest of `identity_of` one value."""
    return identity_of(value).digest


# -- reading ----------------------------------------------------------------------------------------------------------


_STATE = ("comfy_", "prev_comfy_", "_v", "_pin", "_prefetch", "_resident")
_STATE_NAMES = {"weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function", "seed_key"}


def _is_state(name: str) -> bool:
    return name.startswith(_STATE) or name.endswith("_comfy_model_dtype") or name in _STATE_NAMES


class _ObjectReader:
    """Reads ComfyUI's objects for a `Digester`, which passes it every object."""

    def __init__(self) -> None:
        self.digester = Digester(self._substitute, _is_state)
        self._modules: dict[int, tuple[int, str]] = {}  # by id(): number of its model, and its name in it
        self._kinds: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
            (ModelPatcher, self._patcher),
            (comfy.sd.CLIP, _clip),
            (comfy.sd.VAE, _vae),
            (TeacherVision, lambda vision: ("vision", _counted("vision", vars(vision)))),
            (comfy.supported_models_base.BASE, _config),
            (comfy.weight_adapter.WeightAdapterBase, _adapter),
            (comfy.weight_adapter.BypassInjectionManager, lambda manager: ("bypass", manager.hooks)),
            (comfy.weight_adapter.BypassForwardHook, _bypass),
            (_SHIFTED, _sampling),
            (QuantizedTensor, _quantized),
            (Tensor, _tensor),
            (nn.Module, self._module),
            (types.MethodType, _method),
        )

    def _substitute(self, value: Any) -> Any:
        for kind, read in self._kinds:
            if isinstance(value, kind):
                return read(value)
        own = getattr(value, "__dict__", None)  # classes of other packs that replace a CLIP or a VAE
        if isinstance(own, dict) and isinstance(own.get("patcher"), ModelPatcher):
            return _clip(value) if "cond_stage_model" in own else _vae(value) if "first_stage_model" in own else value
        return value

    def _patcher(self, patcher: Any) -> Any:
        weights, number = LoadedWeights(patcher), len(self._modules)
        for module, name in weights.names.items():
            self._modules.setdefault(module, (number, name))
        return "patcher", weights.digest(self.digester), _network(patcher), _counted("patcher", _settled(patcher))

    def _module(self, module: Any) -> Any:
        if hasattr(module, "_orig_mod"):  # the result of torch.compile
            return "compiled", module._orig_mod
        place = self._modules.get(id(module))
        return module if place is None else ("layer", place)


def _counted(owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that the table says do not count."""
    left_out = {row.what for row in TABLE[owner] if not row.counts}
    return {name: values[name] for name in sorted(values) if name not in left_out}


# -- MODEL ------------------------------------------------------------------------------------------------------------


def _settled(patcher: Any) -> dict[str, Any]:
    """The patcher's attributes as they are between two samplings, without empty entries."""
    values = dict(vars(patcher))
    if patcher.hook_patches_backup is not None:
        values["hook_patches"] = patcher.hook_patches_backup
    values["hook_patches"] = [_by_name(patches) for patches in values["hook_patches"].values()]
    for name in ("patches", "object_patches", "weight_wrapper_patches", "injections", "attachments"):
        values[name] = _by_name(values[name])
    for name in ("wrappers", "callbacks"):
        calls = values[name].items()
        values[name] = [(kind, key, own) for kind, keys in calls for key, own in keys.items() if own]
    companions = values["additional_models"]  # "multigpu": the same model for other devices
    values["additional_models"] = _by_name({key: own for key, own in companions.items() if key != "multigpu"})
    return values


def _by_name(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Sorted by name, without empty lists."""
    return {key: values[key] for key in sorted(values, key=str) if values[key] not in ([], ())}


def _network(patcher: Any) -> dict[str, Any]:
    """The parts of the network that count, apart from its layers, with the patcher's objects."""
    names = [row.what for row in TABLE["network"] if row.counts]
    there = [name for name in names if name in patcher.object_patches or hasattr(patcher.model, name)]
    return {name: patcher.get_model_object(name) for name in there}


def _config(config: Any) -> Any:
    names = [row.what for row in TABLE["config"] if row.counts]
    return "config", name_of(type(config)), {name: getattr(config, name) for name in names}


_SHIFTED = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.ModelSamplingFlux)
_OF_MODULES = vars(nn.Module()).keys()


def _sampling(sampling: Any) -> Any:
    """Without the table of noise levels, which follows from the shift: dynamic VRAM may leave that of another clone."""
    own = {name: value for name, value in vars(sampling).items() if name not in _OF_MODULES and not _is_state(name)}
    return "sampling", type(sampling), own


# -- what patches are made of -----------------------------------------------------------------------------------------


_WHERE_IT_IS_PUT = {"multiplier", "is_conv", "conv_dim", "kernel_size", "in_channels", "out_channels", "kw_dict"}
_CASTS = (torch.float32, torch.float16, torch.bfloat16)


def _adapter(adapter: Any) -> Any:
    """A LoRA or similar for one weight, without the tensor names of its file and without a bypass's own attributes."""
    own = {name: value for name, value in vars(adapter).items() if name not in {"loaded_keys", *_WHERE_IT_IS_PUT}}
    return "adapter", name_of(type(adapter)), own


def _bypass(hook: Any) -> Any:
    """A LoRA beside a layer, its tensors in the dtype that ComfyUI casts them to when it first applies them."""
    dtype = getattr(getattr(hook.module, "weight", None), "dtype", None)
    tensors = getattr(hook.adapter, "weights", None)
    if isinstance(hook.adapter, nn.Module) or not isinstance(tensors, (list, tuple)):
        return "bypass", hook.module, hook.multiplier, hook.adapter
    cast = [value.to(dtype) if isinstance(value, Tensor) and dtype in _CASTS else value for value in tensors]
    return "bypass", hook.module, hook.multiplier, name_of(type(hook.adapter)), cast


def _quantized(value: Any) -> Any:
    fields = {field.name: getattr(value._params, field.name) for field in dataclasses.fields(value._params)}
    return "quantised", value._layout_cls, fields, value._qdata


def _tensor(value: Any) -> Any:
    if hasattr(value, "tensor_type"):  # ComfyUI-GGUF: bytes, and how to read them
        return "gguf", str(value.tensor_type), tuple(value.shape), value.as_subclass(Tensor)
    return value


def _method(method: types.MethodType) -> Any:
    """How a merge reads a weight of another model, without the layer, which may be patched now."""
    layer, name = method.__self__, method.__func__.__name__
    if isinstance(layer, nn.Module) and name in ("convert_weight", "set_weight"):
        return "conversion", name_of(type(layer)), name
    return method


# -- CLIP and VAE -----------------------------------------------------------------------------------------------------


def _vae(vae: Any) -> Any:
    return "VAE", _counted("VAE", vars(vae))


def _clip(clip: Any) -> Any:
    tokenizer = vars(clip).get("tokenizer")
    return "CLIP", _counted("CLIP", {**vars(clip), "tokenizer": tokenizer and _tokenizer(tokenizer)})


def _tokenizer(tokenizer: Any) -> Any:
    """Its class, numbers and texts, and those of the tokenizers in it; the vocabulary follows from the class."""
    plain = {name: value for name, value in vars(tokenizer).items() if isinstance(value, (str, int, float, type(None)))}
    inner = {n: _tokenizer(v) for n, v in vars(tokenizer).items() if hasattr(v, "tokenize_with_weights")}
    plain.pop("embedding_directory", None)
    return name_of(type(tokenizer)), plain, inner, getattr(tokenizer, "state_dict", dict)()
