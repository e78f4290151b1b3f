"""A LoRA on a MODEL for drawing, as ComfyUI's own loaders apply it: which one, which part of it is used, how strong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...dopsd_core.number_text import read_float
from .lora_fit import require_finite, used_keys
from .paths import never_the_same, stamp_of
from .sockets import TrainedLora

NONE = "none"
"""The choice of no file."""

MAX_STRENGTHS, MAX_STRENGTH = 8, 10.0


def stamp_of_choice(lora_name: str | None, connected: bool) -> Any:
    """For `fingerprint_inputs`: changes when the file of `lora_name` is replaced, so that ComfyUI runs the node again.

    Args:
        connected: whether a LoRA is connected, and the file not read.
    """
    if lora_name == NONE or connected:
        return NONE
    if lora_name is None:  # it comes over a link
        return never_the_same()
    return stamp_of(folder_paths.get_full_path_or_raise("loras", lora_name))


def parse_strengths(text: str) -> list[float]:
    """ "0.5, 1" -> [0.5, 1.0].

    Raises:
        ValueError: no number, too many, or one out of range.
    """
    words = text.replace(";", ",").replace("\n", ",").split(",")
    found: list[float] = []
    for word in (word.strip() for word in words if word.strip()):
        try:
            value = read_float(word)
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
        ValueError: there is neither, or the file cannot be read.
    """
    if lora is not None:
        return "the connected LoRA", dict(lora)
    if lora_name == NONE:
        raise ValueError(f"there is no LoRA to {verb}: choose a file in lora_name, or connect lora")
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    try:
        return lora_name, dict(comfy.utils.load_torch_file(path, safe_load=True))
    except Exception as error:  # its readers raise nearly anything on damaged files
        raise ValueError(f"{lora_name} cannot be read, it is damaged or not a LoRA file: {error}") from error


def facts_of_lora(lora_name: str, lora: Mapping[str, Tensor] | None) -> Mapping[str, str]:
    """The header of the LoRA that `chosen_lora` reads, lora_A [rank, in]; empty if it has none."""
    if lora is not None:
        return lora.facts if isinstance(lora, TrainedLora) else {}
    return header_of(folder_paths.get_full_path_or_raise("loras", lora_name))


def header_of(path: str | Path) -> Mapping[str, str]:
    """The metadata of a safetensors file; empty for other files."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def used_line(name: str, model: Any, tensors: Mapping[str, Tensor]) -> str:
    """How many tensors (as in `chosen_lora`, of any shape) ComfyUI's loader will apply, and one that it will not.

    Raises:
        ValueError: it will apply none, or one that is not finite.
    """
    used = used_keys(model, tensors)
    require_finite(name, {key: tensors[key] for key in tensors if key in used})
    rest = [key for key in tensors if key not in used and _comfyuis(key) not in used]
    line = f"{name}: {len(tensors) - len(rest)} of {len(tensors)} tensors fit and are used"
    return f"{line}, {len(rest)} are not, such as {rest[0]}" if rest else line


def _comfyuis(key: str) -> str:
    """What ComfyUI reads instead of this magnitude of a DoRA; the key itself for any other."""
    return key.replace(".lora_magnitude_vector", ".dora_scale")


def apply_lora(model: Any, tensors: Mapping[str, Tensor], strength: float) -> Any:
    """The model with the LoRA, as ComfyUI's own loaders return it; tensors by name, of any shape."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]
