"""The teacher reads an image together with its caption: with the CLIP's own vision tower, or with Qwen3-VL's.

Some families' text encoder is a whole vision-language model (Krea 2): the CLIP encodes the image itself. The text
encoder of Z-Image and FLUX.2-klein 4B is Qwen3-4B, the language model that Qwen3-VL-4B was trained from. With the
vision tower (0.8 GB) and Qwen3-VL's positions, it reads an image; no second language model is loaded. `ComfyFamily`
says which of the two it is. Template, hidden states and padding are the CLIP's own: the teacher's features only differ
from the student's by the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import CoreModelPatcher
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders import llama, qwen3vl
from torch import Tensor, nn

from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.conditioning.seen_size import MAX_PIXELS, MIN_PIXELS, seen_size
from ...dopsd_core.conditioning.teachers import TEACHER_VIEWS
from ...dopsd_core.demo.model_files import IMAGE_PAD, VISION_CELL, resize_for_vision
from .families import ImageReader, family_of_clip, in_comfyui

MAX_TOKENS = 1024  # of image and caption together; the image's come first
_IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"
_PAD = 151643


@dataclass(frozen=True, eq=False)
class VisionSpec:
    """A kind of vision tower.

    Attributes:
        title: its name for users.
        tower: arguments of its class.
        lm_config: the language model's configuration while it reads an image.
        min_pixels: smallest size at which an image is seen.
        max_pixels: largest size at which an image is seen.
    """

    title: str
    tower: Mapping[str, Any]
    lm_config: Any
    min_pixels: int
    max_pixels: int


def qwen3vl_4b() -> VisionSpec:
    """Qwen3-VL-4B, which sees images at 512^2 to 768^2 pixels, like the paper's teacher for Z-Image-Turbo."""
    config = llama.Qwen3VL_4BConfig()
    sizes = {**qwen3vl.QWEN3VL_VISION_COMMON, **qwen3vl.QWEN3VL_VISION["qwen3vl_4b"]}
    return VisionSpec("Qwen3-VL-4B", {**sizes, "out_hidden_size": config.hidden_size}, config, MIN_PIXELS, MAX_PIXELS)


@dataclass(frozen=True, eq=False)
class TeacherVision:
    """A loaded vision tower that the CLIP does not hold.

    Attributes:
        model: the network.
        patcher: ComfyUI's ModelPatcher of it.
        lm_config: the configuration of the CLIP's language model while it reads an image.
        min_pixels: smallest size at which an image is seen.
        max_pixels: largest size at which an image is seen; if equal to `min_pixels`, every image has about this size.
    """

    model: nn.Module
    patcher: Any
    lm_config: Any
    min_pixels: int
    max_pixels: int


def new_vision(state: Mapping[str, Tensor], spec: VisionSpec, ops: Any, dtype: torch.dtype) -> TeacherVision:
    """The tower with the weights of `state`: tensors by name without prefix, each [...] as in the tower's state_dict.

    Raises:
        RuntimeError: tensors are left over or have other shapes.
    """
    offload = comfy.model_management.text_encoder_offload_device()
    model = qwen3vl.Qwen3VLVisionModel(dict(spec.tower), device=offload, dtype=dtype, ops=ops)
    patcher = CoreModelPatcher(model, comfy.model_management.text_encoder_device(), offload)
    model.load_state_dict(state, strict=True, assign=patcher.is_dynamic())
    model.eval().requires_grad_(False)
    comfy.model_management.archive_model_dtypes(model)
    return TeacherVision(model, patcher, spec.lm_config, spec.min_pixels, spec.max_pixels)


# -- reading ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_image_text(clip: Any, vision: TeacherVision | None, text: str, image: Tensor) -> Tensor:
    """The teacher's features [L, D] fp32 (CPU) of image [3, H, W] in [0, 1] and its caption; L <= `MAX_TOKENS`.

    The end of a caption that is too long is cut off, never the end of the template.

    Args:
        vision: the tower; None if the CLIP holds it.

    Raises:
        ValueError: there is no tower, or the CLIP does not belong to it.
    """
    encoder = text_encoder(clip, vision)
    size = seen_size(image.shape[1], image.shape[2], *_pixels(vision))
    resized = resize_for_vision(image.float(), size).movedim(0, -1)[None]
    ids = _tokens(clip, text, resized)
    features = _read_by_clip(clip, ids) if vision is None else _read_with_tower(clip, encoder, vision, ids)
    return features.float().cpu()


@torch.inference_mode()
def encode_with_references(clip: Any, images: Sequence[Tensor], text: str) -> Condition:
    """Features [L, D] of the text, which has read images [3, H, W] in [0, 1] at their own sizes, and their `slots`.

    For CLIPs whose `ImageReader.sees_references`: the images' own features make room for their latents.

    Raises:
        ValueError: a side is not a multiple of 32, or the CLIP does not report where the images stand.
    """
    if any(side % VISION_CELL for image in images for side in image.shape[1:]):
        raise ValueError(f"reference images need sides that are multiples of {VISION_CELL} pixels: crop them")
    tokens = clip.tokenize(text, images=[image.float().movedim(0, -1)[None] for image in images])
    encoded = clip.encode_from_tokens(tokens, return_dict=True)
    slots = tuple(encoded.get("image_slots", ()))
    if len(slots) != len(images):
        raise ValueError(
            f"the text encoder read {len(slots)} of {len(images)} reference images with {text[:40]!r}: write the "
            "caption without <|im_start|>, or update ComfyUI"
        )
    return Condition(encoded["cond"][0], slots=slots)


def image_tokens(vision: TeacherVision | None, width: int, height: int) -> int:
    """How many of the `MAX_TOKENS` an image of this size in pixels takes; vision as in `encode_image_text`."""
    rows, columns = seen_size(height, width, *_pixels(vision))
    return rows * columns // VISION_CELL**2


def count_tokens(clip: Any, text: str, seen: int | None = None) -> int:
    """Tokens of the text in the CLIP's own template, without padding; seen: tokens of an image before it."""
    template = _template(clip) if seen is not None else clip.tokenizer.llama_template
    (ids,) = next(iter(clip.tokenize(text, llama_template=template, min_length=1).values()))
    return len(ids) if seen is None else len(ids) + seen - 1


def _pixels(vision: TeacherVision | None) -> tuple[int, int]:
    """(smallest, largest) size at which an image is seen; the paper's for a tower in the CLIP, whichever it is."""
    return (vision.min_pixels, vision.max_pixels) if vision else (MIN_PIXELS, MAX_PIXELS)


# -- by the CLIP alone ------------------------------------------------------------------------------------------------


def _read_by_clip(clip: Any, ids: list[Any]) -> Tensor:
    """Features [L, D] by the CLIP's own encoding, which also cuts off the system's part of the template."""
    reader = _reader(clip)
    weighted = {reader.encoder: [[(token, 1.0) for token in ids]], **reader.keeping}
    return clip.encode_from_tokens(weighted, return_dict=True)["cond"][0]


# -- with a tower from elsewhere --------------------------------------------------------------------------------------


def _read_with_tower(clip: Any, encoder: Any, vision: TeacherVision, ids: list[Any]) -> Tensor:
    """Features [L, D]. The language model runs with Qwen3-VL's rotary positions meanwhile; with its own, the features
    would be off by 1 %."""
    language_model, reader = encoder.transformer.model, _Reader(encoder.transformer, vision.model)
    device = clip.patcher.load_device
    comfy.model_management.load_models_gpu([clip.patcher, vision.patcher])
    with comfy.model_management.cuda_device_context(device), _config(language_model, vision.lm_config):
        holder: Any = SimpleNamespace(special_tokens={"pad": _PAD}, transformer=reader)
        embeds, mask, _, info = SDClipModel.process_tokens(holder, [ids], device)
        positions, is_image, deepstack = reader.build_image_inputs(embeds, info)
        states = _hidden_states(clip, encoder)
        final, chosen = language_model(
            None,
            attention_mask=mask,
            embeds=embeds,
            intermediate_output=states,
            final_layer_norm_intermediate=encoder.layer_norm_hidden_state,
            dtype=torch.float32,
            position_ids=positions,
            visual_pos_masks=is_image,
            deepstack_embeds=deepstack,
        )[:2]
    hidden = final[0] if states is None else chosen[0]  # [L, D], or [states, L, D]
    return hidden.movedim(0, 1).flatten(1) if hidden.ndim == 3 else hidden


class _Reader:
    """ComfyUI's Qwen3-VL combined from two models: what `process_tokens` expects of one."""

    preprocess_embed = qwen3vl.Qwen3VL.preprocess_embed
    build_image_inputs = qwen3vl.Qwen3VL.build_image_inputs

    def __init__(self, language_model: Any, visual: nn.Module) -> None:
        self.visual, self.get_input_embeddings = visual, language_model.get_input_embeddings


def _reader(clip: Any) -> ImageReader:
    return in_comfyui(family_of_clip(clip)).reader


def has_tower(clip: Any) -> bool:
    """Whether the CLIP holds the vision tower, so that none has to be connected."""
    return _reader(clip).has_tower


def text_encoder(clip: Any, vision: TeacherVision | None) -> Any:
    """The language model of the CLIP that reads images.

    Raises:
        ValueError: the CLIP has none, or the tower is missing, or it belongs to another language model.
    """
    family = family_of_clip(clip)
    entry, reader = in_comfyui(family), _reader(clip)
    encoder = getattr(clip.cond_stage_model, reader.encoder, None)
    if encoder is None:
        others = [name for name in family.teachers if TEACHER_VIEWS[name].sees != "features"]
        instead = f"; or use the mode {others[0]}, which needs no vision tower" if others else ""
        raise ValueError(
            f"the text encoder in this CLIP is not {reader.title}, which the vision tower of the mode vlm belongs to: "
            f"load {entry.clip_files}{instead}"
        )
    if reader.has_tower:
        return encoder
    if vision is None:
        raise ValueError(
            "the teacher needs a vision tower: connect `vision` of Load Teacher Vision (Qwen3-VL-4B) or "
            "Load Demo Models"
        )
    width, wanted = encoder.transformer.model.config.hidden_size, vision.lm_config.hidden_size
    if width != wanted:
        raise ValueError(
            f"the CLIP is {width} wide and the vision tower was made for one of {wanted}: "
            "use the demo model's CLIP and vision together, or qwen_3_4b with Qwen3-VL-4B"
        )
    return encoder


def _template(clip: Any) -> str:
    """The CLIP's own template with an image before the text.

    Without it, the tokenizer of a vision-language model would take another template, of whose tokens the encoder of
    Krea 2 cuts off the image.
    """
    return clip.tokenizer.llama_template.replace("{}", f"{_reader(clip).heading}{_IMAGE_TEXT}{{}}")


def _tokens(clip: Any, text: str, image: Tensor) -> list[Any]:
    """Token ids of the CLIP's own template with image [1, H, W, 3] before the text, padded like its texts."""
    name, template = _reader(clip).encoder, _template(clip)
    tokenizer = getattr(clip.tokenizer, name)
    cells = image.shape[1] * image.shape[2] // VISION_CELL**2  # tokens that replace the one image token
    least = tokenizer.min_length - (cells - 1)
    ids: list[Any] = [token[0] for token in clip.tokenize(text, llama_template=template, min_length=least)[name][0]]
    if IMAGE_PAD not in ids:  # ComfyUI takes a text that starts like a template for a whole one
        raise ValueError(f"the caption {text[:40]!r} replaces the prompt's template: write it without <|im_start|>")
    over = len(ids) + cells - 1 - MAX_TOKENS
    if over > 0:
        ending = len(tokenizer.tokenizer(template.rpartition("{}")[2])["input_ids"])
        end = len(ids) - ending
        del ids[max(end - over, ids.index(IMAGE_PAD) + 2) : end]
    ids[ids.index(IMAGE_PAD)] = {"type": "image", "data": image, "original_type": "image"}
    return ids


def _hidden_states(clip: Any, encoder: Any) -> list[int] | int | None:
    """The hidden states that the CLIP's conditions consist of, with CLIP Set Last Layer; None for the final output.

    Set on the encoder as in the CLIP's own encoding of a text: it may still have the options of another clone.
    """
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    encoder.set_clip_options(
        {"execution_device": None}
    )  # makes it check the layer: a too large number means the default
    layer, index = encoder.layer, encoder.layer_idx
    encoder.reset_clip_options()
    return None if layer == "last" else index if layer == "hidden" else layer


@contextmanager
def _config(model: Any, config: Any) -> Iterator[None]:
    before, model.config = model.config, config
    try:
        yield
    finally:
        model.config = before
