"""diffusers' FLUX.2-klein as a Denoiser, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor, nn

from ...conditioning.encode import Condition
from .diffusers_denoiser import DiffusersDenoiser, equal_shapes


class KleinDenoiser(DiffusersDenoiser[Flux2Transformer2DModel]):
    """FLUX.2-klein in the dtype of its weights."""

    def blocks(self) -> Sequence[nn.Module]:
        """Double-stream blocks, then single-stream blocks."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, C, h, w] -> x0_hat, same shape. References follow the image's tokens, at T = 10, 20, ...

        Conditions of one shape go through the network together.
        """
        rows = equal_shapes(conditions)
        parts = [self._predict_x0(x[some], sigma, [conditions[row] for row in some]) for some in rows]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([row for some in rows for row in some]).argsort().to(x.device)
        return torch.cat(parts)[order]

    def _predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        dtype, (height, width) = self.compute_dtype, x.shape[-2:]
        references = zip(*(condition.reference_latents for condition in conditions), strict=True)
        images = [x, *(torch.stack(latents).to(x.device) for latents in references)]
        features = torch.stack([condition.features for condition in conditions]).to(x.device, dtype)
        out = self.transformer(
            hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], 1).to(dtype),
            encoder_hidden_states=features,
            timestep=torch.full((len(x),), sigma, device=x.device),
            img_ids=torch.cat([_ids(10 * t, p.shape[2], p.shape[3], 1) for t, p in enumerate(images)]).to(x.device),
            txt_ids=_ids(0, 1, 1, features.shape[1]).to(x.device),
            return_dict=False,
        )[0]
        velocity = out[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        return x - sigma * velocity.float()


def _ids(t: int, height: int, width: int, length: int) -> Tensor:
    """Positions [height * width * length, 4]."""
    axes = torch.tensor([t]), torch.arange(height), torch.arange(width), torch.arange(length)
    return torch.cartesian_prod(*axes)


def klein(double: int = 5, single: int = 20, heads: int = 24, context: int = 7680, **settings: Any) -> KleinDenoiser:
    """FLUX.2-klein of this size, on the default device in the default dtype, weights not filled in."""
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
