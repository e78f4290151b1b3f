"""Z-Image-Turbo, and the demo model, a scaled-down version of it."""

from __future__ import annotations

from collections.abc import Mapping

from ..denoiser import BlockShape, SitePart
from ..sigmas import z_image_turbo_sigmas
from .base import Family, split_rows
from .single_file import SingleFile


def native_parts(name: str, out_features: int) -> tuple[SitePart, ...]:
    """Parts of a Linear of the original network: `qkv` is to_q, to_k, to_v, and `out` is to_out.0."""
    if name.endswith("attention.qkv"):
        stem = name.removesuffix("qkv")
        return split_rows((f"{stem}to_q", f"{stem}to_k", f"{stem}to_v"), out_features)
    if name.endswith("attention.out"):
        name = name.removesuffix("out") + "to_out.0"
    return (SitePart(name, 0, out_features),)


def block_shape(name: str, inputs: Mapping[str, int], image_tokens: int, text_tokens: int) -> BlockShape:
    """A block saves 13 D + 4 F elements per token, with width D and MLP width F.

    D: inputs of the four norms 4, of qkv, out, w1 and w3 (one) 3, qkv before its norms 3, q, k, v after RoPE 3.
    F: w1, w3, silu(w1) and the input of w2. Both kinds of tokens are padded to multiples of 32.
    """
    image, text = -(-image_tokens // 32) * 32, -(-text_tokens // 32) * 32
    tokens = image if name.startswith("noise_refiner") else text if name.startswith("context_refiner") else image + text
    dim, hidden = inputs["attention.to_q"], inputs["feed_forward.w2"]
    return BlockShape(tokens, dim, 13 * dim + 4 * hidden)


_SINGLE_FILE = SingleFile(
    names=(
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"\.attention\.norm_(q|k)\.", r".attention.\1_norm."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
    ),
    fused=((("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv"),),
)

Z_IMAGE = Family(
    name="z_image",
    title="Z-Image-Turbo",
    sigmas=lambda num_steps, width, height: z_image_turbo_sigmas(num_steps),
    latent_channels=16,
    downscale=8,
    pixel_multiple=16,
    lora_targets=(
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ),
    native_parts=native_parts,
    block_shape=block_shape,
    teachers=("vlm",),
    patch=2,
    sample_steps=8,
    learning_rate=1e-4,
    single_file=_SINGLE_FILE,
    hub_models={"zimageturbo": "Tongyi-MAI/Z-Image-Turbo"},
)
"""Attention and MLPs of `layers`, `noise_refiner` and `context_refiner`: 238 Linears of the full model."""
