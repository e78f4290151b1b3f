"""One small random FLUX.2-klein twice: ComfyUI's MODEL, and diffusers' network with the same weights.

Import only after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import toy
from torch import Tensor

HEADS, AXES = 2, (8, 12, 12, 16)
WIDTH = HEADS * sum(AXES)
"""Axes of unequal width, so that one taken for another shows."""


def model(text_width: int = 96, double: int = 2, single: int = 2, seed: int = 0) -> Any:
    """A MODEL the way a loader node leaves one: its weights are inference tensors."""
    with torch.inference_mode():
        return toy.flux2(
            seed, hidden_size=WIDTH, num_heads=HEADS, axes_dim=list(AXES), context_in_dim=text_width, depth=double,
            depth_single_blocks=single,
        )  # fmt: skip


def diffusers_klein(model: Any) -> Any:
    """diffusers' Flux2Transformer2DModel with the MODEL's weights; diffusers' own table translates their names."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as converted
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    sizes = model.model.model_config.unet_config
    network = Flux2Transformer2DModel(
        num_layers=sizes["depth"], num_single_layers=sizes["depth_single_blocks"],
        num_attention_heads=sizes["num_heads"], attention_head_dim=sizes["hidden_size"] // sizes["num_heads"],
        joint_attention_dim=sizes["context_in_dim"], axes_dims_rope=tuple(sizes["axes_dim"]), guidance_embeds=False,
    )  # fmt: skip
    network.load_state_dict(converted(dict(model.model.diffusion_model.state_dict())), strict=True)
    return network.eval().requires_grad_(False)


def velocity(
    network: Any, x: Tensor, sigma: float, features: Sequence[Tensor], references: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """noise - x0 [B, 128, h, w] by diffusers' network, one sample after the other.

    features: B of [L, D]. references: of each sample the latents [128, h, w], or () for none. The tokens, their order
    and their positions are made by the pipeline's own methods.
    """
    samples = zip(x.split(1), features, references or [()] * len(x), strict=True)
    return torch.cat([_velocity(network, *sample, sigma) for sample in samples])


def _velocity(network: Any, x: Tensor, features: Tensor, references: Sequence[Tensor], sigma: float) -> Tensor:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline as Pipeline

    texts = features[None]
    tokens, ids = Pipeline._pack_latents(x), Pipeline._prepare_latent_ids(x)
    seen, all_ids = [latent[None] for latent in references], ids
    if seen:
        tokens = torch.cat([tokens, *map(Pipeline._pack_latents, seen)], dim=1)
        all_ids = torch.cat([ids, Pipeline._prepare_image_ids(seen)], dim=1)
    text_ids = Pipeline._prepare_text_ids(texts)
    out = network(tokens, texts, torch.tensor([sigma]), all_ids, text_ids, return_dict=False)[0]
    unpacked: Any = Pipeline._unpack_latents_with_ids(out[:, : ids.shape[1]], ids)
    return unpacked
