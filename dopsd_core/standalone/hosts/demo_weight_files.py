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
from ...families import Z_IMAGE
from ...files.atomic import write_atomic
from .demo_networks import new_text_encoder, new_transformer


def transformer_to_single_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts diffusers' state dict to the single-file layout: fused `attention.qkv` [3 * dim, dim], ComfyUI's names.

    The inverse of diffusers' reader; other tensors keep their shapes.
    """
    assert Z_IMAGE.single_file is not None
    return Z_IMAGE.single_file.from_diffusers(state)


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
