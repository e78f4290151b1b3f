"""Z-Image-Turbo, and the demo model, which is its architecture in small."""

from __future__ import annotations

from ..model import SitePart
from ..sigmas import z_image_turbo_sigmas
from .base import Family, split_rows


def native_parts(name: str, out_features: int) -> tuple[SitePart, ...]:
    """Parts of a Linear of the original network: `qkv` is to_q, to_k, to_v, and `out` is to_out.0."""
    if name.endswith("attention.qkv"):
        stem = name.removesuffix("qkv")
        return split_rows((f"{stem}to_q", f"{stem}to_k", f"{stem}to_v"), out_features)
    if name.endswith("attention.out"):
        name = name.removesuffix("out") + "to_out.0"
    return (SitePart(name, 0, out_features),)


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
    sample_steps=8,
    learning_rate=1e-4,
)
"""Attention and MLPs of `layers`, `noise_refiner` and `context_refiner`: 238 Linears of the full model."""
