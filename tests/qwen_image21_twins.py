"""A small random Qwen-Image 2.1: diffusers' pipeline, and our host around its parts. Needs no ComfyUI and no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MARKS = tuple(
    f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad", "pad")
)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
WIDTH, TEXT_WIDTH = 64, 48


def tokenizer() -> Any:
    """A token for each byte, and Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(MARKS))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>")


def processor(tokenizer: Any) -> Any:
    """Qwen3-VL's, which leaves images of multiples of 32 pixels as they are."""
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    half = [0.5] * 3
    images = Qwen2VLImageProcessor(
        patch_size=16, image_mean=half, image_std=half, min_pixels=32 * 32, max_pixels=2048**2
    )
    for name, mark in (("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>")):
        setattr(tokenizer, name, mark)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT)


def text_encoder(tokenizer: Any) -> Any:
    """transformers' Qwen3-VL with a small tower."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    sizes: dict[str, Any] = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(tokenizer), "rope_parameters": rope,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_heads": 2,
        "num_position_embeddings": 36, "out_hidden_size": TEXT_WIDTH, "patch_size": 16, "spatial_merge_size": 2,
    }  # fmt: skip
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark)
        for name, mark in (
            ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=sizes, vision_config=tower, **ids)
    return fill(Qwen3VLForConditionalGeneration(config), 1)


def transformer(layers: int = 2) -> Any:
    """diffusers' network."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel

    return fill(
        QwenImage21Transformer2DModel(
            num_layers=layers, attention_head_dim=32, num_attention_heads=WIDTH // 32, context_in_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 12, 12),
        ),
        0,
    )  # fmt: skip


def vae() -> Any:
    """The RGBA autoencoder, of 64 channels at a sixteenth of the size."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21

    return fill(AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, dim_mult=[1, 1, 2, 2, 2]), 2)


def pipeline(layers: int = 2) -> Any:
    """diffusers' QwenImage21Pipeline, its scheduler configured as in Turbo's repository: no shift."""
    from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import QwenImage21Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    words = tokenizer()
    pipe = QwenImage21Pipeline(
        FlowMatchEulerDiscreteScheduler(shift=1.0), vae(), text_encoder(words), processor(words), transformer(layers)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Seeded values for every parameter, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2 and parameter[0].numel() > 1:
                values = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            else:
                values = 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values)
    return module.eval().requires_grad_(False)
