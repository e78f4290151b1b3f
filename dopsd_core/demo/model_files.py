"""The demo model's files, sizes and templates, shared by both hosts, in pure torch.

The layouts are those of ComfyUI's single files (docs/demo-model.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .autoencoder import LATENT_CHANNELS, DemoAutoencoder

WEIGHTS = Path(__file__).parent / "weights"
MODEL_FILE = "dopsd_demo_turbo_bf16.safetensors"
PARENT_FILE = "dopsd_demo_parent_bf16.safetensors"  # before the distillation, in the layout of MODEL_FILE
TEXT_ENCODER_FILE = "dopsd_demo_qwen3vl_bf16.safetensors"
VAE_FILE = "dopsd_demo_vae_bf16.safetensors"
JUDGE_FILE = "dopsd_demo_judge_fp16.safetensors"
TOKEN_IDS = "dopsd.token_ids"  # in the text encoder's file: the real token id of each embedding row

TEXT_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEACHER_TEMPLATE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE_PAD = 151655
VISION_PIXELS = 96 * 96  # the teacher sees images at this size; that of Z-Image-Turbo at 512^2..768^2
VISION_CELL = 32  # pixels of one image token: patch 16, merged two by two

TEXT_WIDTH = 128
HEAD_DIM = 64
ROPE_THETA = 5e6
ROPE_SECTION = [12, 10, 10]
TEXT_SIZES = dict(
    hidden_size=TEXT_WIDTH, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
VISION_SIZES = dict(
    depth=3, hidden_size=96, intermediate_size=256, num_heads=3, patch_size=16, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=TEXT_WIDTH, num_position_embeddings=36, deepstack_visual_indexes=[0, 1],
)  # fmt: skip
TRANSFORMER_SIZES = dict(
    dim=256, n_heads=2, n_kv_heads=2, n_layers=4, n_refiner_layers=1, cap_feat_dim=TEXT_WIDTH,
    in_channels=LATENT_CHANNELS, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
)  # fmt: skip


def read_weights(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name in their own shapes, floating-point ones upcast to fp32.

    Raises:
        FileNotFoundError: the file is missing; the message names it.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the demo model's weights come with the repository, restore them from it"
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}


def load_vae(path: Path, conv: type[nn.Conv2d] = nn.Conv2d) -> DemoAutoencoder:
    """Loads the autoencoder with the file's weights; conv: the class of its convolutions."""
    model = DemoAutoencoder(conv=conv)
    model.load_state_dict(read_weights(path))
    return model


def vision_size(height: int, width: int, pixels: int = VISION_PIXELS) -> tuple[int, int]:
    """(height, width) in multiples of 32 with about `pixels` pixels and the image's aspect ratio."""
    scale = (pixels / (height * width)) ** 0.5
    rows, columns = (max(1, round(side * scale / VISION_CELL)) for side in (height, width))
    return rows * VISION_CELL, columns * VISION_CELL


def resize_for_vision(image: Tensor, size: tuple[int, int]) -> Tensor:
    """image [3, H, W] -> [3, *size], like Qwen3-VL's image processor: bicubic, antialiased, not clamped."""
    resize = torch.nn.functional.interpolate
    return resize(image[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
