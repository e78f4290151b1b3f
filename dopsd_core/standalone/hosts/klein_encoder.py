"""FLUX.2-klein's text encoder and VAE, as its pipeline in diffusers uses them."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ...families import FLUX2_KLEIN, Family
from .diffusers_encoder import DiffusersEncoder


class KleinEncoder(DiffusersEncoder):
    """Features are three hidden states side by side, at least 512 tokens."""

    family: ClassVar[Family] = FLUX2_KLEIN
    thinking: ClassVar[bool] = False
    states: ClassVar[tuple[int, ...]] = (9, 18, 27)
    least: ClassVar[int] = 512

    def _features(self, caption: str) -> Tensor:
        return self._pipeline.encode_prompt(caption, device=self._device)[0][0]

    def _load_vae(self) -> Any:
        return self._parts.vae(AutoencoderKLFlux2, _converted)

    def _new_pipeline(self, text_encoder: Any, tokenizer: Any) -> Any:
        unused: Any = None
        return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), unused, text_encoder, tokenizer, unused)

    def _to_latents(self, pixels: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (Flux2KleinPipeline._patchify_latents(self._vae.encode(pixels).latent_dist.mode()) - mean) / std

    def _to_images(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return self._vae.decode(Flux2KleinPipeline._unpatchify_latents(latents * std + mean)).sample

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, C, 1, 1] of the latents."""
        bn = self._vae.bn
        std = (bn.running_var + self._vae.config.batch_norm_eps).sqrt()
        return bn.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def _converted(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The single file's tensors under diffusers' names, with the statistics of the latents; shapes as diffusers'."""
    statistics = {name: value for name, value in state.items() if name.startswith("bn.")}
    return {**convert_ldm_vae_checkpoint(state, config), **statistics}
