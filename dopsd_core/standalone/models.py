"""The networks of the demo model: diffusers' Z-Image transformer, transformers' Qwen3-VL.

All sizes of the demo family stand here. File layouts are those of ComfyUI's single files (docs/demo-model.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

WEIGHTS = Path(__file__).parent / "weights"
TEXT_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEACHER_TEMPLATE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE_PAD = 151655
VISION_PIXELS = 96 * 96  # the teacher sees the picture at this many pixels; Z-Image-Turbo's own teacher at 512^2..768^2
TEXT_WIDTH = 128


def load_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(WEIGHTS / "demo_tokenizer.json"))


def new_transformer(layers: int = 4) -> ZImageTransformer2DModel:
    """Z-Image's single-stream DiT at width 256: two heads of 128, two refiners, `layers` main blocks."""
    return ZImageTransformer2DModel(
        dim=256, n_heads=2, n_kv_heads=2, n_layers=layers, n_refiner_layers=1, cap_feat_dim=TEXT_WIDTH,
        in_channels=16, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
    )  # fmt: skip


def new_text_encoder(token_ids: torch.Tensor) -> Qwen3VLModel:
    """Qwen3-VL in small, with embedding rows only for `token_ids` (sorted real ids, int64 [V])."""

    def row(token: int) -> int:
        return int((token_ids == token).nonzero()[0, 0])

    text = dict(
        vocab_size=len(token_ids), hidden_size=TEXT_WIDTH, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[12, 10, 10], mrope_interleaved=True),
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=96, intermediate_size=256, num_heads=3, patch_size=16, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=TEXT_WIDTH, num_position_embeddings=36, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=row(IMAGE_PAD),
            video_token_id=row(151643),
            vision_start_token_id=row(151652),
            vision_end_token_id=row(151653),
        )  # fmt: skip
    )
