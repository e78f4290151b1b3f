"""Small Krea 2 and Qwen-Image 2.1 in memory and as folders in the layout of the real ones, whose text encoder holds the
vision tower. Made with diffusers and transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tests import qwen_image21_twins as twins

KREA_WIDTH, KREA_LAYERS = 32, 36


@dataclass(frozen=True, eq=False)
class Made:
    """A model in memory, and the folder that it was written to."""

    folder: Path
    denoiser: Any
    encoder: Any


def krea2_text_encoder(words: Any) -> Any:
    """As many layers as the real one has: the features come from the 2nd to the 35th."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    sizes: dict[str, Any] = {
        "hidden_size": KREA_WIDTH, "intermediate_size": 48, "num_hidden_layers": KREA_LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(words), "rope_parameters": rope,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_heads": 2,
        "num_position_embeddings": 36, "out_hidden_size": KREA_WIDTH, "patch_size": 16, "spatial_merge_size": 2,
    }  # fmt: skip
    mark = words.convert_tokens_to_ids("<|image_pad|>")
    return twins.fill(Qwen3VLModel(Qwen3VLConfig(text_config=sizes, vision_config=tower, image_token_id=mark)), 1)


def krea2_transformer() -> Any:
    from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel

    network = Krea2Transformer2DModel(
        num_layers=2, num_attention_heads=2, num_key_value_heads=1, attention_head_dim=128, intermediate_size=128,
        text_hidden_dim=KREA_WIDTH, num_text_layers=12, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=64,
    )  # fmt: skip
    return twins.fill(network, 0)


def make_krea2(folder: Path) -> Made:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    from dopsd_core.standalone.hosts.krea2 import Krea2Denoiser, Krea2Encoder

    words = twins.tokenizer()
    vae = AutoencoderKLQwenImage(base_dim=8)
    parts: dict[str, Any] = {
        "transformer": krea2_transformer(), "vae": twins.fill(vae, 2), "text_encoder": krea2_text_encoder(words)
    }  # fmt: skip
    write(folder, "Krea2Pipeline", parts)
    words.save_pretrained(folder / "tokenizer")
    encoder = Krea2Encoder(parts["text_encoder"], words, parts["vae"], "small")
    return Made(folder, Krea2Denoiser(parts["transformer"]), encoder)


def make_qwen_image21(folder: Path) -> Made:
    from dopsd_core.standalone.hosts.qwen_image21 import QwenImage21Denoiser, QwenImage21Encoder

    pipe = twins.pipeline()
    write(folder, "QwenImage21Pipeline", {name: getattr(pipe, name) for name in ("transformer", "vae", "text_encoder")})
    pipe.processor.save_pretrained(folder / "processor")
    encoder = QwenImage21Encoder(pipe.text_encoder.model, pipe.processor.tokenizer, pipe.vae, "small")
    return Made(folder, QwenImage21Denoiser(pipe.transformer), encoder)


def write(folder: Path, pipeline: str, parts: dict[str, nn.Module]) -> None:
    for name, model in parts.items():
        saved: Any = model
        saved.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")


FAMILIES: dict[str, Callable[[Path], Made]] = {"krea2": make_krea2, "qwen_image21": make_qwen_image21}
