"""LoRAs for tests: every target of the demo model, strong enough to be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from inprocess import ComfyUI


def demo_lora(comfyui: ComfyUI, strength: float = 0.3, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names of a LoRA file for the demo model."""
    model = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    return random_lora(comfyui, model, strength, rank, seed)


def random_lora(comfyui: ComfyUI, model: Any, strength: float, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """The same for any MODEL of a family of ours."""
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    config = denoiser.family.lora_config(rank, float(rank))
    adapters = comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, seed=seed, teacher="frozen")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in adapters.state().items():
        scale = strength / rank**0.5 if ".lora_B." in key else 1 / tensor.shape[1] ** 0.5
        tensors[f"{denoiser.family.key_prefix}{key}"] = torch.randn(tensor.shape, generator=generator) * scale
    return tensors


def give(comfyui: ComfyUI, lora: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A graph node whose only output is this LORA_MODEL."""
    return give_values(comfyui, ("LORA_MODEL",), (lora,))


def give_values(comfyui: ComfyUI, kinds: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """A graph node whose outputs are these values, of these socket types."""
    name = f"TestGive{'_'.join(kinds)}"

    class Give:
        RETURN_TYPES, FUNCTION, CATEGORY = tuple(kinds), "give", "tests"

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {}}

        def give(self) -> tuple:
            return tuple(values)

    comfyui.nodes.NODE_CLASS_MAPPINGS[name] = Give
    return {"class_type": name, "inputs": {}}
