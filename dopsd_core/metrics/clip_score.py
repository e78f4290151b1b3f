"""CLIP-S: cosine of an image and its prompt in CLIP ViT-H-14 with the weights of DFN-5B, through open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..image_grid import to_images
from .needs import MetricUnavailable, Needs

CLIP = Needs(
    "CLIP-S",
    "open_clip_torch torchvision",
    "apple/DFN5B-CLIP-ViT-H-14",
    ("*.json", "*.txt", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
)
ARCHITECTURE = "ViT-H-14-quickgelu"
"""open_clip's name of the network that DFN-5B was trained with, for weights in a single file."""

_DFN = {"interpolation": "bicubic", "resize_mode": "squash"}
"""How DFN-5B's images are prepared, as in open_clip's list of pretrained models."""


class ClipScore:
    """Raw cosine of the features of an image and a text."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self._preprocess, self._tokenizer, self._device = preprocess, tokenizer, device

    @classmethod
    def load(cls, weights: str | Path, device: torch.device | str = "cpu", download: bool = False) -> ClipScore:
        """Loads a CLIP of open_clip.

        Args:
            weights: hub id, folder with open_clip_config.json, or a file with the weights of DFN-5B's ViT-H-14.

        Raises:
            MetricUnavailable: the package or the weights are missing.
        """
        with CLIP.imported():
            import open_clip
        path = CLIP.weights(weights, download)
        if path.is_file():
            made = open_clip.create_model_and_transforms(
                ARCHITECTURE, pretrained=str(path), force_preprocess_cfg=dict(_DFN)
            )
            return cls(made[0], made[2], open_clip.get_tokenizer(ARCHITECTURE), device)
        if not (path / "open_clip_config.json").is_file():
            raise MetricUnavailable(f"CLIP-S: {path} has no open_clip_config.json; give the folder of {CLIP.hub_id}")
        name = f"local-dir:{path.resolve()}"
        made = open_clip.create_model_and_transforms(name)
        return cls(made[0], made[2], open_clip.get_tokenizer(name), device)

    @torch.no_grad()
    def __call__(self, image: Tensor, prompt: str) -> float:
        """The cosine in -1..1, higher is better, of an image [3, H, W] in [0, 1] and a prompt."""
        pixels = self._preprocess(to_images([image])[0])[None].to(self._device)
        seen = self._model.encode_image(pixels)
        read = self._model.encode_text(self._tokenizer([prompt]).to(self._device))
        return float(F.cosine_similarity(seen.float(), read.float())[0])
