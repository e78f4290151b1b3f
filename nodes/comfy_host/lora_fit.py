"""Which tensors of a LoRA ComfyUI's own loader applies to a MODEL, and whether they are finite.

ComfyUI loads what it finds by name, and only logs a tensor of the wrong shape and continues: the demo model has the
same names as the real one. Where two entries are for one weight, it applies the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor

from ...dopsd_core.adapters.lora_file import shown

_PLAIN = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight")
"""Ends of the names of tensors that are added to a weight, or replace it, as they are."""


def used_keys(model: Any, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the tensors, of any shape, that ComfyUI's loader will apply to the model.

    Raises:
        ValueError: none, or ComfyUI cannot read them.
    """
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    try:
        used = _applied(model, converted)
    except (KeyError, RuntimeError, AttributeError, TypeError, IndexError) as error:  # a tensor of a group is missing
        raise ValueError(
            f"ComfyUI cannot apply this LoRA, one of its tensors is missing or damaged ({error}): load another file"
        ) from error
    if not used:
        first = next(iter(tensors), "no key at all")
        raise ValueError(
            f"none of the LoRA's {len(tensors)} tensors fit this model (the first is {first}): "
            "it was trained for another model; load that one"
        )
    if converted.keys() == tensors.keys():
        return frozenset(used)
    renamed = {id(converted[key]) for key in used}
    return frozenset(key for key, tensor in tensors.items() if id(tensor) in renamed)


def require_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks the tensors, of any shape, of the LoRA with that name: images drawn with others are black or noise.

    Raises:
        ValueError: one has NaN or infinity.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(
                f"{name} is damaged: its tensor {shown(key)} contains NaN or infinity; choose another file"
            )


def _applied(model: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys of the patches that fit; `tensors` as `convert_lora` returns them."""
    found: dict[Any, set[str]] = {}  # by target
    parts = {part for key in tensors for part in _beginnings(key)}
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if name in parts:  # one by one: ComfyUI does not say which of several entries a tensor belongs to
            for place, patch in comfy.lora.load_lora(tensors, {name: target}, log_missing=False).items():
                found[place] = _keys_of(patch, tensors) if _fits(model, place, patch) else set()
    return set().union(*found.values())


def _beginnings(key: str) -> Iterator[str]:
    return (key[:place] for place, character in enumerate(key) if character in "._")


def _keys_of(patch: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    if isinstance(patch, tuple):
        return {key for key, tensor in tensors.items() if any(tensor is part for part in patch[1])}
    return {key for key in patch.loaded_keys if not key.endswith(_PLAIN)}


def _fits(model: Any, target: Any, patch: Any) -> bool:
    """Whether a patch has the shape of its weight, or of its slice of it; True for kinds whose shape is not known."""
    key, part = (target, None) if isinstance(target, str) else target[:2]
    try:
        shape = list(comfy.utils.get_attr(model.model, key).shape)
    except AttributeError:
        return False
    if part is not None:
        shape[part[0]] = part[2]
    if isinstance(patch, tuple):
        return patch[0] != "diff" or list(patch[1][0].shape) == shape
    return _size(patch) in (None, (shape[0], math.prod(shape[1:])))


def _size(patch: Any) -> tuple[int, int] | None:
    """(rows, columns) of what a LoRA, LoHa or LoKr adds; None for other kinds, and for those of convolutions."""
    if isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        up, down, _, middle, _, reshape = patch.weights[:6]
        return (up.shape[0], down[0].numel()) if middle is None and reshape is None else None
    if isinstance(patch, comfy.weight_adapter.LoHaAdapter):
        first, second, _, third, fourth, core = patch.weights[:6]
        sizes = {(first.shape[0], second.shape[-1]), (third.shape[0], fourth.shape[-1])}
        return None if core is not None else sizes.pop() if len(sizes) == 1 else (0, 0)
    if isinstance(patch, comfy.weight_adapter.LoKrAdapter) and patch.weights[7] is None:
        first, second, _, *pairs = patch.weights[:7]
        left, right = _factor(first, *pairs[:2]), _factor(second, *pairs[2:])
        return left[0] * right[0], left[1] * right[1]
    return None


def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    """(rows, columns) of a factor of LoKr, stored as it is or as a product."""
    if whole is not None:
        return whole.shape[0], whole[0].numel()
    if a is None or b is None:
        raise KeyError("half of a factor of LoKr")
    return a.shape[0], b[0].numel()
