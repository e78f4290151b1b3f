"""What ComfyUI calls the model families: its classes, names inside their networks, its templates' sampler.

What training needs of a family is in `dopsd_core/families`; a new family also needs an entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.z_image

from ...dopsd_core.families import FLUX2_KLEIN, Z_IMAGE, Family


@dataclass(frozen=True, kw_only=True)
class ComfyFamily:
    """A model family in ComfyUI.

    Attributes:
        family: the core's entry.
        model: class of the MODEL's configuration.
        tokenizer: class of the CLIP's tokenizer.
        clip_files: files of the text encoder, and the type to load them with.
        vae_file: file of the VAE.
        text_width: key in the MODEL's configuration of the width of its text features.
        text_encoders: file for each width of text features.
        text_tokens: longest prompt, with template, that the model was made for; ComfyUI also reads longer ones.
        blocks: names of the network's lists of transformer blocks, in the order of the forward.
        overwritten: names of norms whose input the network overwrites later.
        sampler: sampler of ComfyUI's own templates; training always uses Euler.
        distilled: names of the checkpoints that were distilled for few steps.
    """

    family: Family
    model: type
    tokenizer: type
    clip_files: str
    vae_file: str
    text_width: str
    text_encoders: Mapping[int, str]
    text_tokens: int = 512
    blocks: tuple[str, ...]
    overwritten: frozenset[str] = frozenset()
    sampler: str
    distilled: str


_ALL = (
    ComfyFamily(
        family=Z_IMAGE,
        model=comfy.supported_models.ZImage,
        tokenizer=comfy.text_encoders.z_image.ZImageTokenizer,
        clip_files="qwen_3_4b with type lumina2",
        vae_file="ae.safetensors",
        text_width="cap_feat_dim",
        text_encoders={2560: "qwen_3_4b with type lumina2"},
        blocks=("noise_refiner", "context_refiner", "layers"),
        sampler="res_multistep",
        distilled="z_image_turbo_bf16 or its fp8 or int8 variant",
    ),
    ComfyFamily(
        family=FLUX2_KLEIN,
        model=comfy.supported_models.Flux2,
        tokenizer=comfy.text_encoders.flux.KleinTokenizer,
        clip_files="qwen_3_4b or qwen_3_8b with type flux2",
        vae_file="flux2-vae.safetensors",
        text_width="context_in_dim",
        text_encoders={7680: "qwen_3_4b with type flux2", 12288: "qwen_3_8b with type flux2"},
        blocks=("double_blocks", "single_blocks"),
        overwritten=frozenset({"img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm"}),
        sampler="euler",
        distilled="flux-2-klein-4b or -9b, not their -base-",
    ),
)


def all_families() -> tuple[Family, ...]:
    """Every supported family."""
    return tuple(entry.family for entry in _ALL)


def in_comfyui(family: Family) -> ComfyFamily:
    """The entry of a family."""
    return next(entry for entry in _ALL if entry.family is family)


def family_of(model: Any) -> Family:
    """The family of a MODEL (ModelPatcher).

    Raises:
        ValueError: D-OPSD cannot train this family.
    """
    config = model.model.model_config
    for entry in _ALL:
        if isinstance(config, entry.model):
            return entry.family
    titles = " and ".join(entry.family.title for entry in _ALL)
    raise ValueError(f"this MODEL is a {type(config).__name__}; D-OPSD trains {titles}: load one of them")


def family_of_clip(clip: Any) -> Family:
    """The family that a CLIP encodes captions for.

    Raises:
        ValueError: D-OPSD cannot train this family.
    """
    for entry in _ALL:
        if isinstance(clip.tokenizer, entry.tokenizer):
            return entry.family
    choices = ", or ".join(f"{entry.clip_files} for {entry.family.title}" for entry in _ALL)
    raise ValueError(f"this CLIP has a {type(clip.tokenizer).__name__}; load {choices}")
