"""Tiny random weights in the formats of the real ones, made by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


def need(*packages: str) -> None:
    """Skips the test where a package of the extra [metrics] is missing or does not fit torch."""
    for package in packages:
        try:
            __import__(package)
        except (ImportError, RuntimeError, OSError) as error:
            pytest.skip(f"{package} cannot be imported: {error}")


def image(seed: int, height: int = 48, width: int = 48) -> torch.Tensor:
    """A smooth random image [3, H, W] in [0, 1]."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def dino(folder: Path) -> Path:
    """A DINOv3 of two layers, with four registers as the real one."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16, image_size=48,
        num_register_tokens=4,
    )  # fmt: skip
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def vgg(file: Path) -> Path:
    """torchvision's VGG-16 under its own names, scaled so that activations stay finite."""
    need("torchvision")
    layers = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), *[(256, 256)] * 2, (512, 256), *[(512, 512)] * 5]
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for place, (outside, inside) in zip(places, layers, strict=True):
        scale = (2 / (9 * inside)) ** 0.5
        tensors[f"features.{place}.weight"] = torch.randn(outside, inside, 3, 3, generator=generator) * scale
        tensors[f"features.{place}.bias"] = torch.zeros(outside)
    save_file(tensors, file)
    return file


def clip(folder: Path) -> Path:
    """A CLIP of two layers in open_clip's folder layout."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {
        "model_cfg": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(2)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def inception(file: Path) -> Path:
    """torch-fidelity's Inception v3 with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(3)
    blank = {}

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return super().load_state_dict(state_dict, strict=False)

    torch.save(blank, file)
    model = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    for weight in model.parameters():  # so that features neither vanish nor explode
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    torch.save(model.state_dict(), file)
    return file


def qwen3_vl(folder: Path) -> Path:
    """A Qwen3-VL of one layer with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    special = [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ]  # fmt: skip
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Qwen2Tokenizer(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, min_pixels=32 * 32, max_pixels=64 * 64),
        tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 16,
    }  # fmt: skip
    ids: dict[str, Any] = {
        f"{name}_token_id": vocabulary[f"<|{token}|>"]
        for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    torch.manual_seed(4)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).save_pretrained(
        folder
    )
    return folder
