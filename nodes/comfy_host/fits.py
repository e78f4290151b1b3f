"""Checks that MODEL, CLIP, VAE and conditions belong together, before anything is encoded, drawn or trained.

Otherwise a mismatch would be torch's error about two shapes, or no error at all.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.taesd.taehv
import comfy.taesd.taesd

from ...dopsd_core.demo.model_files import TEXT_WIDTH
from ...dopsd_core.families import Z_IMAGE, Family
from .demo_models import DemoLatents, DemoTextModel
from .families import all_families, block_lists, family_of, family_of_clip, in_comfyui
from .linears import require_known_layers
from .sockets import Conditions

DEMO = "Load Demo Models"


def require_trainable(model: Any, conditions: Conditions, vae: Any | None = None) -> None:
    """Checks a MODEL before it is trained or previewed.

    Raises:
        ValueError: the conditions or the VAE belong to another model.
        UnknownLayer: the network has a layer that D-OPSD cannot train through.
    """
    family = family_of(model)
    if family is not conditions.family:
        raise ValueError(
            f"the conditions are for {conditions.family.title}, the MODEL is {family.title}; connect the CLIP and VAE "
            "of this MODEL to Build Teacher Condition"
        )
    require_text_width(model, conditions.data.pairs[0].student.features.shape[-1], "the conditions have features")
    if vae is not None:
        require_vae(vae, family, is_demo_model(model))
    network = model.model.diffusion_model
    require_known_layers(network, block_lists(network, family))


def require_text_width(model: Any, width: int, whose: str) -> None:
    """Checks the width D of text features [L, D].

    Args:
        whose: the start of the error's sentence.

    Raises:
        ValueError: the MODEL reads text features of another width.
    """
    entry = in_comfyui(family_of(model))
    wanted = text_width(model)
    if wanted is not None and width != wanted:
        file = DEMO if is_demo_model(model) else entry.text_encoders.get(wanted, "its own text encoder")
        raise ValueError(
            f"{whose} of width {width}, and this MODEL reads width {wanted}: they come from another model's text "
            f"encoder; connect the CLIP that belongs to this MODEL ({file})"
        )


def text_width(model: Any) -> int | None:
    """The width of the text features that the MODEL reads; None if its configuration does not say."""
    config = model.model.model_config.unet_config
    sizes = [config.get(key) for key in in_comfyui(family_of(model)).text_width]
    return None if None in sizes else math.prod(sizes)


def is_demo_model(model: Any) -> bool:
    """Whether the MODEL is the demo's: only that reads features of this width."""
    return family_of(model) is Z_IMAGE and text_width(model) == TEXT_WIDTH


def is_demo_clip(clip: Any) -> bool:
    """Whether the CLIP is the demo's."""
    return isinstance(getattr(clip.cond_stage_model, "qwen3_4b", None), DemoTextModel)


def require_vae(vae: Any, family: Family, demo: bool, beside: str = "the MODEL") -> None:
    """Checks that a VAE belongs to a family.

    Args:
        demo: whether it must be the demo model's.
        beside: the input that it must fit, as the error names it.

    Raises:
        ValueError: the VAE belongs to another model.
    """
    entry = in_comfyui(family)
    found = _misfit(vae, family, demo)
    if found is not None:
        owner = "the demo model" if demo else family.title
        wanted = DEMO if demo else f"Load VAE with {entry.vae_file}"
        raise ValueError(f"the input vae is {found}, {beside} is {owner}'s: connect {wanted} to vae")


def require_training_vae(vae: Any, clip: Any) -> None:
    """Checks the VAE that encodes the training images, beside the CLIP that encodes the captions.

    Raises:
        ValueError: they belong to different models, or the VAE only approximates latents.
    """
    family, demo = family_of_clip(clip), is_demo_clip(clip)
    try:
        require_vae(vae, family, demo, "the input clip")
    except ValueError as error:
        others = [in_comfyui(other) for other in all_families() if _misfit(vae, other, demo=False) is None]
        ways = [f"; or, to train {other.family.title}, load the CLIP as {other.clip_files}" for other in others]
        raise ValueError(f"{error}{''.join(ways)}") from None
    if _is_taesd(vae):
        raise ValueError(
            "the input vae is a small preview VAE (TAESD), whose latents are only approximate: connect Load VAE with "
            f"{in_comfyui(family).vae_file} to vae"
        )


def _misfit(vae: Any, family: Family, demo: bool) -> str | None:
    """What the VAE is instead; None if it fits, or if that is not known."""
    if isinstance(getattr(vae, "first_stage_model", None), DemoLatents):
        return None if demo else "the demo model's"
    axes, channels = getattr(vae, "latent_dim", 2), getattr(vae, "latent_channels", None)
    if axes == 1:
        return "one for sound"
    if channels is None:
        return "another model's" if demo else None
    scale = vae.spacial_compression_encode()
    # ComfyUI reports a scale of 8 for every TAESD
    owners = [
        other
        for other in all_families()
        if (in_comfyui(other).latent_axes, other.latent_channels) == (axes, channels)
        and (other.downscale == scale or _is_taesd(vae))
    ]
    if owners == [family] and not demo:
        return None
    if axes == 3 and not owners:
        return "one for video"
    return f"{owners[0].title}'s" if owners else f"one of {channels} channels at 1/{scale} of the image's size"


def _is_taesd(vae: Any) -> bool:
    kinds = (comfy.taesd.taesd.TAESD, comfy.taesd.taehv.TAEHV)
    return isinstance(getattr(vae, "first_stage_model", None), kinds)
