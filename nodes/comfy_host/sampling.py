"""Sampling a few-step model as it was distilled: its own noise schedule, no guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...dopsd_core.families import Family
from .families import in_comfyui
from .fits import require_text_width


def sampler_name(sampler: str, family: Family) -> str:
    """ComfyUI's name for "euler" or "template"."""
    return in_comfyui(family).sampler if sampler == "template" else sampler


def decode_image(vae: Any, latents: Tensor) -> Tensor:
    """The first image [H, W, 3] of latents [B, C, h, w], or [B, C, 1, h, w] where the VAE's have a time axis.

    The alpha of an RGBA VAE is left out.
    """
    images = vae.decode(latents)
    return images.reshape(-1, *images.shape[-3:])[0, ..., :3]


def few_step_sample(
    model: Any,
    positive: Any,
    latent: Tensor,
    seed: int,
    sigmas: Sequence[float],
    sampler_name: str = "euler",
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] of MODEL and CONDITIONING at CFG 1, without a negative prompt.

    Where ComfyUI's latents have a time axis, so do these: [B, C, 1, h, w].

    Args:
        latent: [B, C, h, w]; zeros for a new image.
        seed: of the noise, which is the same as in KSampler.
        callback: called with (step, x0_hat, x, number of steps).

    Raises:
        ValueError: the CONDITIONING comes from the text encoder of another model.
    """
    for features, _ in positive:
        require_text_width(model, features.shape[-1], "positive has features")
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    samples = guider.sample(
        comfy.sample.prepare_noise(latent, seed),
        latent,
        comfy.samplers.sampler_object(sampler_name),
        torch.tensor(sigmas, dtype=torch.float32),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return samples.to(comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype())
