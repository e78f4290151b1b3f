"""Reads and writes the demo model's weight files: single files in ComfyUI's layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from safetensors.torch import save as format_safetensors
from torch import Tensor
from transformers import Qwen3VLModel

from ...demo.model_files import TOKEN_IDS, read_weights
from ...files.atomic import write_atomic
from .demo_networks import new_text_encoder, new_transformer

_COMFY_NAMES = {  # diffusers -> the single-file layout
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.to_out.0.": ".attention.out.",
}  # fmt: skip


def transformer_to_single_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts diffusers' state dict to the single-file layout: fused `attention.qkv` [3 * dim, dim], ComfyUI's names.

    The inverse of diffusers' reader; other tensors keep their shapes.
    """
    out = {}
    for name, value in state.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            parts = [state[name.replace(".to_q.", f".to_{x}.")] for x in "qkv"]
            name, value = name.replace(".to_q.", ".qkv."), torch.cat(parts)
        for ours, theirs in _COMFY_NAMES.items():
            name = name.replace(ours, theirs)
        out[name] = value
    return out


def save_weights(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes tensors of any shape; floating-point ones are cast to `dtype`."""
    cast = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    write_atomic(path, format_safetensors(cast, dict(metadata)))


def load_transformer(path: Path) -> ZImageTransformer2DModel:
    """The transformer with the file's weights, fp32."""
    model = new_transformer()
    model.load_state_dict(convert_z_image_transformer_checkpoint_to_diffusers(read_weights(path)))
    return model


def load_text_encoder(path: Path) -> tuple[Qwen3VLModel, Tensor]:
    """(the encoder, with embedding rows only for the demo's words; the real token id of each row, int64 [V])."""
    state = read_weights(path)
    token_ids = state.pop(TOKEN_IDS).long()
    model = new_text_encoder(token_ids)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model, token_ids


def text_encoder_to_single_file(model: Qwen3VLModel, token_ids: Tensor) -> dict[str, Tensor]:
    """The state dict with Qwen3-VL's names (`model.language_model.*`, `model.visual.*`) and `dopsd.token_ids` [V]."""
    return {f"model.{k}": v for k, v in model.state_dict().items()} | {TOKEN_IDS: token_ids.int()}
