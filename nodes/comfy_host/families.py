"""What ComfyUI calls the model families: its classes, names inside their networks, its templates' sampler.

What training needs of a family is in `dopsd_core/families`; a new family also needs an entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.krea2
import comfy.text_encoders.z_image
from torch import Tensor, nn

from ...dopsd_core.families import FLUX2_KLEIN, KREA2, QWEN_IMAGE21, Z_IMAGE, Family


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """The language model in a CLIP that can read an image together with its caption.

    Attributes:
        encoder: its name in the CLIP and in the tokenizer.
        title: its name for users.
        has_tower: whether the CLIP holds the vision tower too; else it comes from Load Teacher Vision.
        heading: what the model's template writes before an image.
        keeping: entries beside the tokens with which the CLIP keeps the features of an image.
        sees_references: whether it also reads the images that the network gets as references, and reports their places
            in the text.
    """

    encoder: str
    title: str
    has_tower: bool = False
    heading: str = ""
    keeping: Mapping[str, Any] = field(default_factory=dict)
    sees_references: bool = False


_BASE = r"(?<![a-z])base(?![a-z])"
_FORMAT = r"([-_](bf16|f\d+|fp\w+|int\w+|mxfp\w+|nvfp\w+|scaled|convrot|ud|i?q\d\w*))*"
"""What a file's name says of its format, behind the name of the model."""

QWEN3_4B = ImageReader(encoder="qwen3_4b", title="Qwen3-4B")
QWEN3VL_4B = ImageReader(encoder="qwen3vl_4b", title="Qwen3-VL-4B", has_tower=True)
QWEN3VL_8B = ImageReader(
    encoder="qwen3vl_8b",
    title="Qwen3-VL-8B",
    has_tower=True,
    heading="<image1>",
    keeping={"keep_vision": True},
    sees_references=True,
)


@dataclass(frozen=True, kw_only=True)
class ComfyFamily:
    """A model family in ComfyUI.

    Attributes:
        family: the core's entry.
        model: class of the MODEL's configuration.
        tokenizer: class of the CLIP's tokenizer.
        clip_files: files of the text encoder, and the type to load them with.
        vae_file: file of the VAE.
        reader: what reads images for the teacher; a CLIP of the family may lack it (FLUX.2-klein 9B).
        text_width: keys in the MODEL's configuration whose product is the width of its text features.
        text_encoders: file for each width of text features.
        text_tokens: longest prompt, with template, that the model was made for; ComfyUI also reads longer ones.
        blocks: paths of the network's lists of transformer blocks, in the order of the forward.
        overwritten: names of norms whose input the network overwrites later.
        switched_off: flags of the network that are False while D-OPSD uses it, where it has them.
        sampler: sampler of ComfyUI's own templates; training always uses Euler.
        distilled: names of the checkpoints that were distilled for few steps.
        undistilled: regular expression for the names, in lower case, of checkpoints that were not.
        undistilled_config: entries of the MODEL's configuration that only an undistilled checkpoint has.
        remark: a sentence for the notes of every dataset and run; "" for none.
    """

    family: Family
    model: type
    tokenizer: type
    clip_files: str
    vae_file: str
    reader: ImageReader
    text_width: tuple[str, ...]
    text_encoders: Mapping[int, str]
    text_tokens: int = 512
    blocks: tuple[str, ...]
    overwritten: frozenset[str] = frozenset()
    switched_off: tuple[str, ...] = ()
    sampler: str
    distilled: str
    undistilled: str = _BASE
    undistilled_config: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""

    @property
    def latent_axes(self) -> int:
        """Axes of an image's latent behind the channels: 2, or 3 for h and w behind a time axis of length 1."""
        return self.model.latent_format.latent_dimensions


_ALL = (
    ComfyFamily(
        family=Z_IMAGE,
        model=comfy.supported_models.ZImage,
        tokenizer=comfy.text_encoders.z_image.ZImageTokenizer,
        clip_files="qwen_3_4b with type lumina2",
        vae_file="ae.safetensors",
        reader=QWEN3_4B,
        text_width=("cap_feat_dim",),
        text_encoders={2560: "qwen_3_4b with type lumina2"},
        blocks=("noise_refiner", "context_refiner", "layers"),
        sampler="res_multistep",
        distilled="z_image_turbo_bf16 or its fp8 or int8 variant",
        undistilled=rf"{_BASE}|z[-_]?image{_FORMAT}\.\w+",
        # ComfyUI allows fp16 only if the norm weights of the second to last block are small, as in Turbo (its pull
        # request 12065, issue 12176)
        undistilled_config={"allow_fp16": False},
    ),
    ComfyFamily(
        family=FLUX2_KLEIN,
        model=comfy.supported_models.Flux2,
        tokenizer=comfy.text_encoders.flux.KleinTokenizer,
        clip_files="qwen_3_4b or qwen_3_8b with type flux2",
        vae_file="flux2-vae.safetensors",
        reader=QWEN3_4B,
        text_width=("context_in_dim",),
        text_encoders={7680: "qwen_3_4b with type flux2", 12288: "qwen_3_8b with type flux2"},
        blocks=("double_blocks", "single_blocks"),
        overwritten=frozenset({"img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm"}),
        sampler="euler",
        distilled="flux-2-klein-4b or -9b, not their -base-",
    ),
    ComfyFamily(
        family=KREA2,
        model=comfy.supported_models.Krea2,
        tokenizer=comfy.text_encoders.krea2.Krea2Tokenizer,
        clip_files="qwen3vl_4b_fp8_scaled with type krea2",
        vae_file="qwen_image_vae.safetensors",
        reader=QWEN3VL_4B,
        text_width=("txtlayers", "txtdim"),
        text_encoders={30720: "qwen3vl_4b_fp8_scaled with type krea2"},
        text_tokens=546,  # 512 and the system's 34, which the encoder cuts off
        blocks=("txtfusion.layerwise_blocks", "txtfusion.refiner_blocks", "blocks"),
        sampler="euler",
        distilled="krea2_turbo_fp8_scaled or its bf16 or int8 variant, not Krea-2-Raw",
        undistilled=rf"{_BASE}|(?<![a-z])raw(?![a-z])",
    ),
)


@cache
def _qwen_image21(model: type) -> ComfyFamily:
    """Of a ComfyUI newer than those that this pack is tested with."""
    return ComfyFamily(
        family=QWEN_IMAGE21,
        model=model,
        tokenizer=importlib.import_module("comfy.text_encoders.qwen_image21").QwenImage21Tokenizer,
        clip_files="qwen3vl_8b_int8_convrot with type qwen_image",
        vae_file="qwen_image_2.1_vae_bf16.safetensors",
        reader=QWEN3VL_8B,
        text_width=("context_in_dim",),
        text_encoders={4096: "qwen3vl_8b_int8_convrot with type qwen_image"},
        text_tokens=1 << 20,  # diffusers' pipeline has no limit
        blocks=("transformer_blocks",),
        overwritten=frozenset({"img_norm1", "img_norm2"}),
        # keys and values of text and references are those of the first step: without gradients, of an older LoRA
        switched_off=("prefix_cache_enabled",),
        sampler="euler",
        distilled="qwen_image_2.1_turbo_bf16 or its int8 variant",
        undistilled=rf"{_BASE}|qwen[-_ ]?image[-_ ]?2[._]?1{_FORMAT}\.\w+",
        remark="Qwen-Image 2.1 Turbo has not run in a real ComfyUI with this pack, only on a stand-in for ComfyUI's "
        "model: check the previews, and the saved LoRA in Few-Step Sampler",
    )


def _entries() -> tuple[ComfyFamily, ...]:
    """The families that this ComfyUI knows."""
    model = getattr(comfy.supported_models, "QwenImage21", None)
    return _ALL if model is None else (*_ALL, _qwen_image21(model))


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else "".join(names)


def all_families() -> tuple[Family, ...]:
    """Every supported family that this ComfyUI knows."""
    return tuple(entry.family for entry in _entries())


def in_comfyui(family: Family) -> ComfyFamily:
    """The entry of a family."""
    return next(entry for entry in _entries() if entry.family is family)


def block_lists(network: nn.Module, family: Family) -> Mapping[str, Sequence[nn.Module]]:
    """The network's lists of transformer blocks by path, in the order of the forward."""
    lists: dict[str, Any] = {path: network.get_submodule(path) for path in in_comfyui(family).blocks}
    return lists


def with_time(latents: Tensor, family: Family) -> Tensor:
    """Latents [B, C, h, w] as ComfyUI has the family's: [B, C, 1, h, w] where it has a time axis."""
    return latents.unsqueeze(2) if in_comfyui(family).latent_axes == 3 else latents


def without_time(latents: Tensor, family: Family) -> Tensor:
    """The inverse of `with_time`.

    Raises:
        ValueError: the latents [B, C, t, h, w] are of several images, t > 1.
    """
    if in_comfyui(family).latent_axes == 2 or latents.ndim == 4:
        return latents
    if latents.shape[2] != 1:
        raise ValueError(f"latents of one image are expected, these are of {latents.shape[2]}: {list(latents.shape)}")
    return latents.squeeze(2)


def family_of(model: Any) -> Family:
    """The family of a MODEL (ModelPatcher).

    Raises:
        ValueError: D-OPSD cannot train this family.
    """
    config = model.model.model_config
    for entry in _entries():
        if isinstance(config, entry.model):
            return entry.family
    titles = listed([entry.family.title for entry in _entries()])
    raise ValueError(f"this MODEL is a {type(config).__name__}; D-OPSD trains {titles}: load one of them")


def family_of_clip(clip: Any) -> Family:
    """The family that a CLIP encodes captions for.

    Raises:
        ValueError: D-OPSD cannot train this family.
    """
    for entry in _entries():
        if isinstance(clip.tokenizer, entry.tokenizer):
            return entry.family
    choices = ", or ".join(f"{entry.clip_files} for {entry.family.title}" for entry in _entries())
    raise ValueError(f"the input clip has a {type(clip.tokenizer).__name__}: load {choices}")
