"""The networks of the demo model: diffusers' Z-Image transformer, transformers' Qwen3-VL."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

from ...demo.model_files import (
    HEAD_DIM,
    IMAGE_PAD,
    ROPE_SECTION,
    ROPE_THETA,
    TEXT_SIZES,
    TRANSFORMER_SIZES,
    VISION_SIZES,
    WEIGHTS,
)


def load_tokenizer() -> Tokenizer:
    """The demo model's tokenizer."""
    return Tokenizer.from_file(str(WEIGHTS / "demo_tokenizer.json"))


def new_transformer(layers: int = 4) -> ZImageTransformer2DModel:
    """Z-Image's single-stream DiT with width 256: two heads of 128, two refiners, `layers` main blocks."""
    return ZImageTransformer2DModel(**{**TRANSFORMER_SIZES, "n_layers": layers})


def new_text_encoder(token_ids: torch.Tensor) -> Qwen3VLModel:
    """A scaled-down Qwen3-VL, with embedding rows only for `token_ids` (sorted real ids, int64 [V])."""

    def row(token: int) -> int:
        return int((token_ids == token).nonzero()[0, 0])

    rope = dict(rope_type="default", rope_theta=ROPE_THETA, mrope_section=ROPE_SECTION, mrope_interleaved=True)
    sizes = dict(vocab_size=len(token_ids), head_dim=HEAD_DIM, max_position_embeddings=512, rope_parameters=rope)
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config=TEXT_SIZES | sizes,
            vision_config=dict(VISION_SIZES),
            image_token_id=row(IMAGE_PAD),
            video_token_id=row(151643),
            vision_start_token_id=row(151652),
            vision_end_token_id=row(151653),
        )
    )
