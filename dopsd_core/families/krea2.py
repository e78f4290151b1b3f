"""Krea 2 Turbo."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..denoiser import BlockShape, SitePart
from ..sigmas import krea2_turbo_sigmas
from .base import Family
from .single_file import SingleFile, flattened

TEXT_LAYERS = 12
"""Hidden states of the text encoder in the features of one token; the layerwise blocks read each as a token."""

_BLOCK = re.compile(r"(blocks|txtfusion\.(?:layerwise|refiner)_blocks)\.(\d+)\.(.+)")
_NAMES = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}


def native_parts(name: str, out_features: int) -> tuple[SitePart, ...]:
    """The Linear of the original network under diffusers' name; names outside the blocks do not change."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        kind, index, rest = block.groups()
        place = "transformer_blocks" if kind == "blocks" else kind.replace("txtfusion", "text_fusion")
        name = f"{place}.{index}.{_NAMES.get(rest, rest)}"
    return (SitePart(name, 0, out_features),)


def block_shape(name: str, inputs: Mapping[str, int], image_tokens: int, text_tokens: int) -> BlockShape:
    """A block saves 15 D + 2 K + 4 F elements of 16 bits per token, with width D, width K of keys and MLP width F.

    D: inputs of the two norms, in fp32 and therefore twice, 4; inputs of qkv and MLP 2; q before its norm, in fp32, 2;
    q, k, v per head of q 3; attention, its copy in the order of tokens, its gate and their product 4. K: k before its
    norm, in fp32, 2. F: the gate of the MLP, its silu, up and the product 4. Keys are a quarter of the width in the
    main blocks. In the text fusion they have all of it, attention needs no copy, and the layerwise blocks see each of
    the `TEXT_LAYERS` features of a text token as a token.
    """
    dim, hidden = inputs["attn.to_q"], inputs["ff.down"]
    if "layerwise_blocks" in name:
        return BlockShape(TEXT_LAYERS * text_tokens, dim, 16 * dim + 4 * hidden, reach=TEXT_LAYERS)
    if "refiner_blocks" in name:
        return BlockShape(text_tokens, dim, 16 * dim + 4 * hidden)
    return BlockShape(image_tokens + text_tokens, dim, 15 * dim + dim // 2 + 4 * hidden)


_SINGLE_FILE = SingleFile(
    names=(
        (r"^img_in\.", "first."),
        (r"^time_embed\.linear_1\.", "tmlp.0."),
        (r"^time_embed\.linear_2\.", "tmlp.2."),
        (r"^time_mod_proj\.", "tproj.1."),
        (r"^txt_in\.norm\.weight", "txtmlp.0.scale"),
        (r"^txt_in\.linear_1\.", "txtmlp.1."),
        (r"^txt_in\.linear_2\.", "txtmlp.3."),
        (r"^final_layer\.linear\.", "last.linear."),
        (r"^final_layer\.norm\.weight", "last.norm.scale"),
        (r"^final_layer\.scale_shift_table", "last.modulation.lin"),
        (r"^text_fusion\.", "txtfusion."),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.attn\.norm_(q|k)\.weight", r".attn.qknorm.\1norm.scale"),
        (r"\.norm1\.weight", ".prenorm.scale"),
        (r"\.norm2\.weight", ".postnorm.scale"),
        (r"\.scale_shift_table", ".mod.lin"),
        *((rf"\.{re.escape(ours)}\.", f".{own}.") for own, ours in _NAMES.items()),
    ),
    values=((r"\.mod\.lin$", flattened),),
)

KREA2 = Family(
    name="krea2",
    title="Krea 2 Turbo",
    sigmas=lambda num_steps, width, height: krea2_turbo_sigmas(num_steps),
    latent_channels=16,
    downscale=8,
    pixel_multiple=16,
    lora_targets=tuple(f"transformer_blocks.*.{part}" for part in _NAMES.values()),
    native_parts=native_parts,
    block_shape=block_shape,
    teachers=("vlm",),
    patch=2,
    sample_steps=8,
    learning_rate=1e-4,
    single_file=_SINGLE_FILE,
    hub_models={"krea2turbo": "krea/Krea-2-Turbo"},
)
"""Attention and MLPs of the 28 blocks: 224 Linears. `text_fusion.*_blocks.*` selects those of the text fusion.

The paper does not train this model: rank, alpha and learning rate are its values for Z-Image-Turbo.
"""
