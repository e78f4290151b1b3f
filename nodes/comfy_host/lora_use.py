"""A LoRA on a MODEL for drawing, as ComfyUI's own loaders apply it: which one, which part of it fits, how strong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import folder_paths
from torch import Tensor

NONE = "none"
"""The choice of no file."""

MAX_STRENGTHS, MAX_STRENGTH = 8, 10.0


def parse_strengths(text: str) -> list[float]:
    """ "0.5, 1" -> [0.5, 1.0].

    Raises:
        ValueError: no number, too many, or one out of range.
    """
    words = text.replace(";", ",").replace("\n", ",").split(",")
    found: list[float] = []
    for word in (word.strip() for word in words if word.strip()):
        try:
            value = float(word)
        except ValueError:
            raise ValueError(
                f"strengths: {word!r} is not a number; write numbers separated by commas: 0.5, 1.0"
            ) from None
        if not abs(value) <= MAX_STRENGTH:
            raise ValueError(f"strengths: {word} is not within -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}")
        found.append(value)
    if not 1 <= len(found) <= MAX_STRENGTHS:
        raise ValueError(f"strengths: give 1 to {MAX_STRENGTHS} numbers separated by commas, there are {len(found)}")
    return list(dict.fromkeys(found))


def chosen_lora(lora_name: str, lora: Mapping[str, Tensor] | None, verb: str) -> tuple[str, dict[str, Tensor]]:
    """Title and tensors of the connected LoRA, else of the file, such as lora_A [rank, in] and lora_B [out, rank].

    Args:
        verb: what the node does with it, for the error.

    Raises:
        ValueError: there is neither.
    """
    if lora is not None:
        return "the connected LoRA", dict(lora)
    if lora_name == NONE:
        raise ValueError(f"there is no LoRA to {verb}: choose a file in lora_name, or connect lora")
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    return lora_name, comfy.utils.load_torch_file(path, safe_load=True)


def used_line(name: str, model: Any, tensors: Mapping[str, Tensor]) -> str:
    """How many tensors (as in `chosen_lora`, of any shape) ComfyUI's loader will apply, and one that it will not.

    Raises:
        ValueError: it will apply none.
    """
    used = used_keys(model, tensors)
    rest = [key for key in tensors if key not in used]
    line = f"{name}: {len(used)} of {len(tensors)} tensors fit and are used"
    return f"{line}, {len(rest)} are not, such as {rest[0]}" if rest else line


def count_used(model: Any, tensors: Mapping[str, Tensor]) -> int:
    """How many tensors, of any shape, ComfyUI's loader will apply to the model.

    Raises:
        ValueError: none.
    """
    return len(used_keys(model, tensors))


def used_keys(model: Any, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the tensors, of any shape, that ComfyUI's loader will apply to the model.

    Raises:
        ValueError: none.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False)
    fitting = [patch for target, patch in loaded.items() if _fits(model, target, patch)]
    if not fitting:
        first = next(iter(tensors), "no key at all")
        raise ValueError(
            f"none of the LoRA's {len(tensors)} tensors fit this model (the first is {first}): "
            "it was trained for another model; load that one"
        )
    return frozenset().union(*(getattr(patch, "loaded_keys", ()) for patch in fitting))


def _fits(model: Any, target: Any, patch: Any) -> bool:
    """Whether a LoRA has the shape of its weight, or of its slice of it.

    ComfyUI only logs a mismatch and continues. The demo model has the same names as the real one.
    """
    if not isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        return True
    key, part = (target, None) if isinstance(target, str) else target[:2]
    shape = list(comfy.utils.get_attr(model.model, key).shape)
    if part is not None:
        shape[part[0]] = part[2]
    up, down = patch.weights[:2]
    return up.shape[0] == shape[0] and down[0].numel() == math.prod(shape[1:])


def apply_lora(model: Any, tensors: Mapping[str, Tensor], strength: float) -> Any:
    """The model with the LoRA, as ComfyUI's own loaders return it; tensors by name, of any shape."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]
