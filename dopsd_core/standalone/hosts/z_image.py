"""diffusers' Z-Image as a Denoiser, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from ...conditioning.encode import Condition
from .diffusers_denoiser import DiffusersDenoiser


class ZImageDenoiser(DiffusersDenoiser[ZImageTransformer2DModel]):
    """Z-Image in the dtype of its weights."""

    def blocks(self) -> Sequence[nn.Module]:
        """Refiners and main blocks, in calling order."""
        net = self.transformer
        return [*net.noise_refiner, *net.context_refiner, *net.layers]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, C, h, w] fp32 -> x0_hat, same shape. The network runs on 1 - sigma and predicts x0 - noise."""
        time, dtype = torch.full((len(x),), 1.0 - sigma, device=x.device), self.compute_dtype
        features = [condition.features.to(x.device, dtype) for condition in conditions]
        out = self.transformer(list(x.to(dtype).unsqueeze(2).unbind(0)), time, features, return_dict=False)[0]
        return x + sigma * torch.stack(list(out)).squeeze(2).float()


def z_image(layers: int = 30, heads: int = 30, **settings: Any) -> ZImageDenoiser:
    """Z-Image of this size, on the default device in the default dtype, weights not filled in."""
    return ZImageDenoiser(
        ZImageTransformer2DModel(n_layers=layers, dim=128 * heads, n_heads=heads, n_kv_heads=heads, **settings)
    )
