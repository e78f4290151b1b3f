"""DINO-D: how far a generated image is from its source in DINOv3's features (arXiv 2605.05204, section 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .needs import MetricUnavailable, Needs
from .pixels import imagenet_normalised, resized_to

DINO = Needs("DINO-D", "transformers", "facebook/dinov3-vits16plus-pretrain-lvd1689m")
"""DINOv3 ViT-S+/16."""


class DinoDistance:
    """1 - cosine of two images' features: the L2-normalised mean of the patch tokens behind the last norm."""

    def __init__(self, model: Any, device: torch.device | str = "cpu") -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device

    @classmethod
    def load(cls, weights: str | Path, device: torch.device | str = "cpu", download: bool = False) -> DinoDistance:
        """Loads a DINO vision transformer in the format of transformers.

        Args:
            weights: folder or hub id.

        Raises:
            MetricUnavailable: the package or the weights are missing.
        """
        with DINO.imported():
            from transformers import AutoModel
        folder = DINO.folder(DINO.weights(weights, download))
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        if not hasattr(model.config, "patch_size"):
            raise MetricUnavailable(f"DINO-D: {folder} is a {type(model).__name__}, not a vision transformer")
        return cls(model, device)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Features [D] of length 1 of an image [3, H, W] in [0, 1], fp32."""
        pixels = imagenet_normalised(image.to(self._device))[None]
        tokens = self._model(pixel_values=pixels).last_hidden_state[0]
        before = 1 + getattr(self._model.config, "num_register_tokens", 0)  # the class token comes first
        return F.normalize(tokens[before:].float().mean(0), dim=0)

    def __call__(self, source: Tensor, generated: Tensor) -> float:
        """The distance in 0..2, lower is better: source [3, h, w] and generated [3, H, W], both in [0, 1]."""
        return float(1 - self.features(resized_to(source, generated)) @ self.features(generated))
