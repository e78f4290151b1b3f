"""Qwen-Image 2.1 Turbo."""

from __future__ import annotations

from collections.abc import Mapping

from ..denoiser import BlockShape, SitePart
from ..sigmas import qwen_image21_turbo_sigmas
from .base import Family, split_rows


def native_parts(name: str, out_features: int) -> tuple[SitePart, ...]:
    """ComfyUI's network fuses the two halves of the MLP, the gate first; all other names are diffusers'."""
    if name.endswith("img_mlp.gate_up"):
        stem = name.removesuffix("gate_up")
        return split_rows((f"{stem}gate_layer", f"{stem}proj"), out_features)
    return (SitePart(name, 0, out_features),)


def block_shape(name: str, inputs: Mapping[str, int], image_tokens: int, text_tokens: int) -> BlockShape:
    """A block saves 16 D + 4 F elements per token in diffusers' network, with width D and MLP width F.

    D: inputs of the norms 2, of qkv and MLP 2, scales and gates of each token 4, q and k before their norms 2, q and k
    after RoPE and v 3, attention 1, input of the output projection 1, normed q or k 1. F: gate, silu, up, product 4.
    """
    dim = inputs["attn.to_q"]
    return BlockShape(image_tokens + text_tokens, dim, 16 * dim + 4 * inputs["img_mlp.out"])


QWEN_IMAGE21 = Family(
    name="qwen_image21",
    title="Qwen-Image 2.1 Turbo",
    sigmas=lambda num_steps, width, height: qwen_image21_turbo_sigmas(num_steps),
    latent_channels=64,
    downscale=16,
    pixel_multiple=32,
    lora_targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "img_mlp.gate_layer",
        "img_mlp.proj",
        "img_mlp.out",
    ),
    native_parts=native_parts,
    block_shape=block_shape,
    teachers=("edit", "vlm", "edit_target"),
    patch=1,
    sample_steps=8,
    learning_rate=1e-4,
    hub_models={"qwenimage21turbo": "Qwen/Qwen-Image-2.1-Turbo"},
    unguided="true_cfg_scale=1.0",
)
"""Attention and MLPs of the 32 blocks: 224 Linears.

The paper does not train this model: rank, alpha and learning rate are its values for Z-Image-Turbo.
"""
