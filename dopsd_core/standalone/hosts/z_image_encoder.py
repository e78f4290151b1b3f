"""Z-Image's text encoder and VAE, as its pipeline in diffusers uses them."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ...families import Z_IMAGE, Family
from .diffusers_encoder import DiffusersEncoder


class ZImageEncoder(DiffusersEncoder):
    """Features are the last hidden state but one, without padding."""

    family: ClassVar[Family] = Z_IMAGE
    thinking: ClassVar[bool] = True
    states: ClassVar[tuple[int, ...]] = (-2,)
    least: ClassVar[int] = 1

    def _features(self, caption: str) -> Tensor:
        return self._pipeline.encode_prompt(caption, device=self._device, do_classifier_free_guidance=False)[0][0]

    def _load_vae(self) -> Any:
        return self._parts.vae(AutoencoderKL, convert_ldm_vae_checkpoint)

    def _new_pipeline(self, text_encoder: Any, tokenizer: Any) -> Any:
        unused: Any = None
        return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), unused, text_encoder, tokenizer, unused)

    def _to_latents(self, pixels: Tensor) -> Tensor:
        config = self._vae.config
        return (self._vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor

    def _to_images(self, latents: Tensor) -> Tensor:
        config = self._vae.config
        return self._vae.decode(latents / config.scaling_factor + config.shift_factor).sample
