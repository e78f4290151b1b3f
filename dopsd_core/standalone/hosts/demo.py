"""The host without ComfyUI: implements Denoiser and Encoder for the demo model, on any torch device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3VLModel

from ...adapters.lora_application import applied_lora
from ...conditioning.encode import Condition
from ...demo.autoencoder import DemoAutoencoder
from ...demo.model_files import (
    IMAGE_PAD,
    MODEL_FILE,
    PARENT_FILE,
    TEACHER_TEMPLATE,
    TEXT_ENCODER_FILE,
    TEXT_TEMPLATE,
    VAE_FILE,
    VISION_PIXELS,
    WEIGHTS,
    load_vae,
    vision_size,
)
from ...denoiser import Denoiser
from .demo_networks import load_tokenizer
from .demo_weight_files import load_text_encoder, load_transformer
from .qwen3vl import image_patches
from .z_image import ZImageDenoiser


class StandaloneDenoiser(ZImageDenoiser):
    """The demo's Z-Image transformer as a Denoiser, with frozen fp32 weights."""

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, 16, h, w] fp32 -> x0_hat, same shape."""
        # with tens of tokens, unfused attention has a much faster backward on a CPU
        with sdpa_kernel([SDPBackend.MATH] if x.device.type == "cpu" else list(SDPBackend.__members__.values())):
            return super().predict_x0(x, sigma, conditions)


class StandaloneEncoder:
    """transformers' Qwen3-VL and the demo's autoencoder as an Encoder."""

    def __init__(self, model: Qwen3VLModel, token_ids: Tensor, vae: DemoAutoencoder, identity: str) -> None:
        self.model, self.vae = model.eval().requires_grad_(False), vae.eval().requires_grad_(False)
        self._row = {int(token): row for row, token in enumerate(token_ids)}
        self._identity = identity

    @property
    def identity(self) -> str:
        """Digest of the weights with layer and image size."""
        return self._identity

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use."""
        return load_tokenizer()

    @torch.no_grad()
    def encode_text(self, caption: str) -> Condition:
        """Features [L, 128] of the caption."""
        rows = self._rows(TEXT_TEMPLATE.format(caption))
        return Condition(self._hidden(rows))

    @torch.no_grad()
    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """Features [L, 128] of image [3, H, W] in [0, 1], resized to about `VISION_PIXELS` pixels, and caption."""
        pixels, grid = vision_patches(image)
        template = TEACHER_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * int(grid.prod() // 4))
        rows = self._rows(template.format(caption))
        is_image = (rows == self._row[IMAGE_PAD]).long()
        return Condition(self._hidden(rows, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=is_image))

    @torch.no_grad()
    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [16, H/8, W/8]."""
        return self.vae.encode(image[None].to(self._vae_device) * 2 - 1)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 16, h, w] -> images [B, 3, 8h, 8w] in [0, 1]."""
        parts = latents.to(self._vae_device).split(64)
        return torch.cat([self.vae.decode(part) for part in parts]).add(1).div(2).clamp(0, 1)

    @property
    def _vae_device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def unknown_words(self, captions: Iterable[str]) -> list[str]:
        """The words of the captions that the demo model's tokenizer splits into pieces."""
        words = {word.strip(".,;:!?") for caption in captions for word in caption.split()}
        known = self.tokenizer.get_vocab()
        bracketed = {word for word in words if word.startswith("[") and word.endswith("]")}
        return sorted(word for word in words - bracketed if word and word not in known and f"\u0120{word}" not in known)

    def _rows(self, text: str) -> Tensor:
        return torch.tensor([[self._row[token] for token in self.tokenizer.encode(text).ids]])

    def _hidden(self, rows: Tensor, **vision) -> Tensor:
        device = self.model.device
        vision = {name: value.to(device) for name, value in vision.items()}
        rows = rows.to(device)
        out = self.model(
            input_ids=rows, attention_mask=torch.ones_like(rows), output_hidden_states=True, use_cache=False, **vision
        )
        return out.hidden_states[-2][0].float()


@dataclass(frozen=True)
class DemoModel:
    """The demo model.

    Attributes:
        denoiser: the distilled transformer.
        encoder: text encoder, vision tower and autoencoder.
        fingerprint: digest of the transformer's file.
    """

    denoiser: StandaloneDenoiser
    encoder: StandaloneEncoder
    fingerprint: str


def load_undistilled(folder: Path = WEIGHTS) -> tuple[StandaloneDenoiser, str]:
    """The demo model's transformer before its distillation, on the CPU, and the digest of its file.

    Raises:
        FileNotFoundError: the file is missing; the message names it.
    """
    denoiser = StandaloneDenoiser(load_transformer(folder / PARENT_FILE))
    return denoiser, _digest(folder, PARENT_FILE)


def load_demo_model(folder: Path = WEIGHTS, device: str = "cpu") -> DemoModel:
    """Loads the embedded weights, upcast to fp32.

    Raises:
        FileNotFoundError: a weight file is missing; the message names it.
    """
    text_encoder, token_ids = load_text_encoder(folder / TEXT_ENCODER_FILE)
    identity = f"demo-qwen3vl/{_digest(folder, TEXT_ENCODER_FILE, VAE_FILE)}/hidden-2/{VISION_PIXELS}"
    vae, transformer = load_vae(folder / VAE_FILE), load_transformer(folder / MODEL_FILE)
    for network in (text_encoder, vae, transformer):
        nn.Module.to(network, device)
    encoder = StandaloneEncoder(text_encoder, token_ids, vae, identity)
    return DemoModel(StandaloneDenoiser(transformer), encoder, _digest(folder, MODEL_FILE))


def _digest(folder: Path, *names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def with_lora(denoiser: Denoiser, path: Path, strength: float = 1.0) -> Iterator[None]:
    """Applies a LoRA file to the denoiser inside the `with` block.

    Raises:
        ValueError: it is not a LoRA file, or it is for other layers.
    """
    adapters = applied_lora(denoiser.sites(), path, strength, denoiser.device)
    with adapters.attached(), adapters.use("student" if strength else "off"):
        yield


def vision_patches(image: Tensor) -> tuple[Tensor, Tensor]:
    """image [3, H, W] in [0, 1] -> (patches [N, 1536], grid [[1, h, w]]) at the demo's size."""
    return image_patches(image, vision_size(*image.shape[1:]))
