"""Small stock files as ComfyUI's loader nodes give them, and its nodes called by themselves, for tests of identity.

Import only after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from inprocess import ComfyUI

LOADERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "MODEL": ("UNETLoader", {"unet_name": "z_image_turbo_bf16.safetensors", "weight_dtype": "default"}),
    "klein": ("UNETLoader", {"unet_name": "flux-2-klein-4b.safetensors", "weight_dtype": "default"}),
    "CLIP": ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
    "VAE": ("VAELoader", {"vae_name": "ae.safetensors"}),
    "vision": ("DOPSD_LoadTeacherVision", {"vision_name": "qwen3vl_4b_fp8_scaled.safetensors"}),
}
FILES = (
    "diffusion_models/z_image_turbo_bf16", "diffusion_models/flux-2-klein-4b", "text_encoders/qwen_3_4b",
    "text_encoders/qwen3vl_4b_fp8_scaled", "vae/ae",
)  # fmt: skip


def apply(comfyui: ComfyUI, node: str, **inputs: Any) -> Any:
    """The first output of a node, called as the executor calls it."""
    kind = comfyui.nodes.NODE_CLASS_MAPPINGS[node]

    @torch.inference_mode()
    def called() -> Any:
        if hasattr(kind, "define_schema"):
            return kind.execute(**inputs).args[0]
        return getattr(kind(), kind.FUNCTION)(**inputs)[0]

    return comfyui.call(called)


def load(comfyui: ComfyUI, kind: str, **inputs: str) -> Any:
    """Loaded anew. kind: a key of `LOADERS`; inputs: of the loader, over those there."""
    node, usual = LOADERS[kind]
    return apply(comfyui, node, **{**usual, **inputs})


def to_device(comfyui: ComfyUI, *models: Any) -> None:
    """What every use of a model does first. models: MODEL, CLIP, VAE or vision."""
    import comfy.model_management

    patchers = [getattr(model, "patcher", model) for model in models]
    comfyui.call(torch.inference_mode()(comfy.model_management.load_models_gpu), patchers)


def off_device(comfyui: ComfyUI) -> None:
    import comfy.model_management

    comfyui.call(torch.inference_mode()(comfy.model_management.unload_all_models))


def identities(comfyui: ComfyUI) -> Callable[..., str]:
    """who(*values): their digest; fails where something inside cannot be compared."""
    identity_of = comfyui.module("nodes.comfy_host.identity").identity_of

    def who(*values: Any) -> str:
        found = comfyui.call(torch.inference_mode()(identity_of), *values)
        assert not found.unknown, found.unknown
        return found.digest

    return who
