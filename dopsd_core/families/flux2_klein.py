"""FLUX.2-klein, 4B and 9B."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..denoiser import BlockShape, SitePart
from ..sigmas import flux2_klein_sigmas
from .base import Family, split_rows
from .single_file import SingleFile, swapped_halves

_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def native_parts(name: str, out_features: int) -> tuple[SitePart, ...]:
    """Parts of a Linear of the original network with diffusers' names; names outside the blocks do not change."""
    block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name)
    if block is None:
        return (SitePart(name, 0, out_features),)
    kind, index, rest = block.groups()
    stem = f"transformer_blocks.{index}." if kind == "double" else f"single_transformer_blocks.{index}."
    if kind == "double" and rest in _QKV:
        return split_rows(tuple(stem + part for part in _QKV[rest]), out_features)
    return (SitePart(stem + (_DOUBLE if kind == "double" else _SINGLE).get(rest, rest), 0, out_features),)


def block_shape(name: str, inputs: Mapping[str, int], image_tokens: int, text_tokens: int) -> BlockShape:
    """A double-stream block saves 12 D + 4 F elements per token and a single-stream block 9 D + 4 F, with width D and
    MLP width F.

    D, double: inputs of the norms 2, of qkv, proj and MLP 3, qkv 3, q, k after RoPE and v 3, attention 1. Single: input
    of the norm 1, of its first Linear 1, qkv 3 (v among them), q, k after RoPE 2, attention 1 and its copy in the input
    of the second Linear 1. F: the gated pair 2, silu 1, the product 1. Texts are padded to 512 tokens.
    """
    tokens = image_tokens + max(text_tokens, 512)
    if "attn.to_qkv_mlp_proj" in inputs:
        dim = inputs["attn.to_qkv_mlp_proj"]
        return BlockShape(tokens, dim, 9 * dim + 4 * (inputs["attn.to_out"] - dim))
    dim = inputs["attn.to_q"]
    return BlockShape(tokens, dim, 12 * dim + 4 * inputs["ff.linear_out"], has_streams=True)


_SINGLE_FILE = SingleFile(
    names=(
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
        (r"^(\w+_stream_modulation\w*)\.linear\.", r"\1.lin."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        *(
            (rf"^single_transformer_blocks\.(\d+)\.{re.escape(ours)}\.", rf"single_blocks.\1.{own}.")
            for own, ours in _SINGLE.items()
        ),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        *(
            (rf"^transformer_blocks\.(\d+)\.{re.escape(ours)}\.", rf"double_blocks.\1.{own}.")
            for own, ours in _DOUBLE.items()
        ),
        (r"^transformer_blocks\.(\d+)\.((?:img|txt)_attn\.qkv)\.", r"double_blocks.\1.\2."),
    ),
    fused=tuple((parts, whole) for whole, parts in _QKV.items()),
    values=((r"^final_layer\.adaLN_modulation\.1\.", swapped_halves),),
)

FLUX2_KLEIN = Family(
    name="flux2_klein",
    title="FLUX.2-klein",
    sigmas=flux2_klein_sigmas,
    latent_channels=128,
    downscale=16,
    pixel_multiple=16,
    lora_targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    ),
    native_parts=native_parts,
    block_shape=block_shape,
    teachers=("edit", "vlm", "edit_target"),
    patch=1,
    sample_steps=4,
    learning_rate=2e-5,
    paper_steps=3000,
    single_file=_SINGLE_FILE,
    hub_models={
        "flux2klein4b": "black-forest-labs/FLUX.2-klein-4B",
        "flux2klein9b": "black-forest-labs/FLUX.2-klein-9B",
    },
)
"""Attention and MLPs of the double-stream AND the single-stream blocks (the reference scripts miss the latter)."""
