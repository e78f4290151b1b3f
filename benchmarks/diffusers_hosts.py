"""diffusers' networks as Denoisers, with random weights and any size, for use without ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from dopsd_core.conditioning.encode import Condition
from dopsd_core.denoiser import LinearSite, plain_linear_sites
from dopsd_core.standalone.hosts.demo import StandaloneDenoiser
from dopsd_core.standalone.hosts.krea2 import Krea2Denoiser


class ZImageDenoiser(StandaloneDenoiser):
    """Z-Image in the dtype of its weights."""

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        t, dtype = torch.full((len(x),), 1.0 - sigma, device=x.device), self.transformer.dtype
        features = [condition.features.to(x.device, dtype) for condition in conditions]
        out = self.transformer(list(x.to(dtype).unsqueeze(2).unbind(0)), t, features, return_dict=False)[0]
        return x + sigma * torch.stack(list(out)).squeeze(2).float()


class KleinDenoiser:
    """FLUX.2-klein in the dtype of its weights. All conditions of a call have one shape."""

    def __init__(self, transformer: Flux2Transformer2DModel) -> None:
        self.transformer = transformer.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def sites(self) -> Sequence[LinearSite]:
        return plain_linear_sites(self.transformer)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, C, h, w] -> x0_hat, same shape. References follow the image's tokens, at T = 10, 20, ..."""
        dtype, (height, width) = self.transformer.dtype, x.shape[-2:]
        references = zip(*(condition.reference_latents for condition in conditions), strict=True)
        pictures = [x, *(torch.stack(latents).to(x.device) for latents in references)]
        features = torch.stack([condition.features for condition in conditions]).to(x.device, dtype)
        out = self.transformer(
            hidden_states=torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], 1).to(dtype),
            encoder_hidden_states=features,
            timestep=torch.full((len(x),), sigma, device=x.device),
            img_ids=torch.cat([_ids(10 * t, p.shape[2], p.shape[3], 1) for t, p in enumerate(pictures)]).to(x.device),
            txt_ids=_ids(0, 1, 1, features.shape[1]).to(x.device),
            return_dict=False,
        )[0]
        velocity = out[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        return x - sigma * velocity.float()


def _ids(t: int, height: int, width: int, length: int) -> Tensor:
    """Positions [height * width * length, 4]."""
    axes = torch.tensor([t]), torch.arange(height), torch.arange(width), torch.arange(length)
    return torch.cartesian_prod(*axes)


def z_image(layers: int = 30, heads: int = 30, **settings: Any) -> ZImageDenoiser:
    """On the default device in the default dtype, weights not filled in."""
    return ZImageDenoiser(
        ZImageTransformer2DModel(n_layers=layers, dim=128 * heads, n_heads=heads, n_kv_heads=heads, **settings)
    )


def klein(double: int = 5, single: int = 20, heads: int = 24, context: int = 7680, **settings: Any) -> KleinDenoiser:
    """On the default device in the default dtype, weights not filled in."""
    return KleinDenoiser(
        Flux2Transformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=context,
            guidance_embeds=False,
            **settings,
        )
    )


def krea2(blocks: int = 28, heads: int = 48, **settings: Any) -> Krea2Denoiser:
    """On the default device in the default dtype, weights not filled in."""
    sizes = {"num_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1)}
    # as ComfyUI computes it from the width
    hidden = 128 * -(-4 * (256 * heads // 3) // 128)
    return Krea2Denoiser(Krea2Transformer2DModel(**sizes, intermediate_size=hidden, **settings))
