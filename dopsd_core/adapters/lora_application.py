"""LoRA files of D-OPSD, of every kind, applied to a network for sampling."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..denoiser import LinearSite
from .adapter_set import AdapterSet
from .dora import Dora
from .lokr import Lokr
from .lora import Lora
from .lora_file import PREFIXES, load_lora, read_safetensors, shown

_OURS = re.compile(
    r"(?P<part>.+)\.(lora_[AB]\.weight|lora_magnitude_vector|dora_scale|lokr_w1|lokr_w2|lokr_w2_a|lokr_w2_b)"
)


def applied_lora(
    sites: Sequence[LinearSite], path: Path, strength: float = 1.0, device: torch.device | str = "cpu"
) -> AdapterSet:
    """An adapter set that changes the network by `strength` times what the file does; not attached yet.

    Raises:
        ValueError: it is not a LoRA file of D-OPSD, or it is for other layers.
        FileNotFoundError: there is no such file.
    """
    tensors = _bare(read_safetensors(path)[0])
    if not any(".lokr_" in key or key.endswith(".lora_magnitude_vector") for key in tensors):
        tensors = load_lora(path)[0]
    config = _config_of(tensors, path)
    adapters = AdapterSet(sites, config, device=device, teacher="frozen")
    adapters.strength = strength
    adapters.load_state("student", {name: value.float() for name, value in tensors.items()})
    return adapters


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(next((p for p in PREFIXES if key.startswith(p)), "")): t for key, t in tensors.items()}


def _config_of(tensors: Mapping[str, Tensor], path: Path) -> Lora:
    """The adapter of the file with a scale of 1."""
    parts: dict[str, None] = {}
    for key in tensors:
        match = _OURS.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: {shown(key)} does not belong to a LoRA of D-OPSD; use a file of Save LoRA")
        parts[match["part"]] = None
    targets = tuple(parts)
    if not any(".lokr_" in key for key in tensors):
        rank = max((value.shape[0] for name, value in tensors.items() if ".lora_A." in name), default=1)
        kind = Dora if any(key.endswith(".lora_magnitude_vector") for key in tensors) else Lora
        return kind(rank=rank, alpha=rank, targets=targets)
    products = [len(value) for key, value in tensors.items() if key.endswith(".lokr_w2_b")]
    whole = [max(value.shape) for key, value in tensors.items() if key.endswith(".lokr_w2")]
    rank = products[0] if products else max(whole)
    factor = max(2, *(max(value.shape) for key, value in tensors.items() if key.endswith(".lokr_w1")))
    return Lokr(rank=rank, alpha=rank, factor=factor, targets=targets)
