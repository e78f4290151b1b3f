"""The teacher's eyes: Qwen3-VL's vision tower beside the language model that the CLIP already holds.

Z-Image's text encoder is Qwen3-4B, the language model that Qwen3-VL-4B grew from: with the vision tower (0.8 GB) in
front of it and Qwen3-VL's positions, it reads a picture together with its caption. No second language model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import CoreModelPatcher
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders import llama, qwen3vl
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..dopsd_core.standalone.demo_files import (
    IMAGE_PAD,
    TEACHER_TEMPLATE,
    VISION_CELL,
    resize_for_vision,
    vision_size,
)

MAX_TOKENS = 1024  # of picture and caption together; the picture's come first
HIDDEN_LAYER = -2  # as Z-Image's own conditions
_PREFIXES = ("model.visual.", "visual.")
_PAD = 151643


@dataclass(frozen=True, eq=False)
class VisionSpec:
    """A kind of vision tower: its name, the config of its class, and how the teacher reads with it."""

    title: str
    tower: Mapping[str, Any]
    lm_config: Any
    min_pixels: int
    max_pixels: int


def qwen3vl_4b() -> VisionSpec:
    """Qwen3-VL-4B, seeing at 512^2 to 768^2 pixels as D-OPSD's teacher of Z-Image-Turbo does."""
    config = llama.Qwen3VL_4BConfig()
    sizes = {**qwen3vl.QWEN3VL_VISION_COMMON, **qwen3vl.QWEN3VL_VISION["qwen3vl_4b"]}
    return VisionSpec("Qwen3-VL-4B", {**sizes, "out_hidden_size": config.hidden_size}, config, 512 * 512, 768 * 768)


@dataclass(frozen=True, eq=False)
class TeacherVision:
    """A vision tower in ComfyUI's hands.

    lm_config: what the CLIP's language model runs with while it reads a picture. A picture is seen at min_pixels to
    max_pixels; where the two are equal, at about as many.
    """

    model: nn.Module
    patcher: Any
    lm_config: Any
    min_pixels: int
    max_pixels: int


def new_vision(state: Mapping[str, Tensor], spec: VisionSpec, ops: Any, dtype: torch.dtype) -> TeacherVision:
    """The tower with the weights of `state`, whose names have no prefix.

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


# -- from a file ------------------------------------------------------------------------------------------------------


def load_teacher_vision(path: str | Path, spec: VisionSpec | None = None) -> TeacherVision:
    """The vision tower of one safetensors file, plain or quantised; nothing else of the file is read.

    Raises:
        ValueError: the file holds something else; the message says what was expected and what was found.
    """
    spec, name, dtype = spec or qwen3vl_4b(), Path(path).name, torch.bfloat16
    try:
        with safe_open(path, "pt") as file:
            names = {short: full for full in file.keys() if (short := _short_name(full))}  # noqa: SIM118  no mapping
            _refuse_others(name, {short: file.get_slice(full).get_shape() for short, full in names.items()}, spec)
            state = {short: file.get_tensor(full) for short, full in names.items()}
            metadata = _tower_metadata(file.metadata() or {})
        state, _ = comfy.utils.convert_old_quants(state, "", metadata)
        ops = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True)
        return new_vision(_in_dtype(state, dtype), spec, ops, dtype)
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f"{name} cannot be read as the vision tower of {spec.title}: {str(e)[:300]}") from e


def _short_name(name: str) -> str:
    """The name inside the tower, or "" for what does not belong to it. `scaled_fp8` marks an older fp8 layout."""
    if name == "scaled_fp8":
        return name
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), "")


def _refuse_others(name: str, shapes: Mapping[str, Sequence[int]], spec: VisionSpec) -> None:
    wanted = _describe(spec.tower["hidden_size"], spec.tower["depth"], spec.tower["deepstack_visual_indexes"])
    wanted += f", output {spec.tower['out_hidden_size']}"
    inside = [key for key in shapes if key != "scaled_fp8"]
    if not inside:
        found = "no vision tower at all (no `visual.*` tensors)"
    elif "pos_embed.weight" not in shapes or "merger.linear_fc2.weight" not in shapes:
        found = "a vision tower of another kind (Qwen2.5-VL?)"
    else:
        width, output = shapes["pos_embed.weight"][-1], shapes["merger.linear_fc2.weight"][0]
        found = _describe(width, len(_indices(inside, "blocks.")), _indices(inside, "deepstack_merger_list."))
        found += f", output {output}"
    if found != wanted:
        raise ValueError(
            f"{name} is not {spec.title}: expected its vision tower ({wanted}), found {found}. "
            f"Choose a file of {spec.title} with vision"
        )
    meta = qwen3vl.Qwen3VLVisionModel(dict(spec.tower), device="meta", dtype=torch.bfloat16, ops=comfy.ops.manual_cast)
    if missing := sorted(meta.state_dict().keys() - shapes.keys()):
        raise ValueError(
            f"{name} holds only a part of the vision tower of {spec.title} ({len(missing)} tensors such as "
            f"visual.{missing[0]} are missing): choose a single file with the whole model"
        )


def _describe(width: int, blocks: int, deepstack: Iterable[object]) -> str:
    return f"width {width}, {blocks} blocks, {len(list(deepstack))} DeepStack mergers"


def _indices(names: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}


def _tower_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Which layers are quantised may stand in the header, under the file's own names."""
    if (key := "_quantization_metadata") not in metadata:
        return {}
    layers = json.loads(metadata[key])["layers"]
    return {key: json.dumps({"layers": {short: v for full, v in layers.items() if (short := _short_name(full))}})}


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything in `dtype` but the quantised layers."""
    quantised = {name.removesuffix(".comfy_quant") for name in state if name.endswith(".comfy_quant")}
    return {
        name: value.to(dtype) if value.is_floating_point() and name.rpartition(".")[0] not in quantised else value
        for name, value in state.items()
    }


# -- reading ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_image_text(clip: Any, vision: TeacherVision, text: str, image: Tensor) -> Tensor:
    """The teacher's features [L, D] fp32 (CPU) of image [3, H, W] in [0, 1] and its caption; L <= `MAX_TOKENS`.

    The language model runs with Qwen3-VL's rotary positions meanwhile: with its own the features are 1 % off.

    Raises:
        ValueError: the CLIP is not the text encoder that belongs to the vision tower.
    """
    language_model = _language_model(clip, vision)
    reader = _Reader(language_model, vision.model)
    size = seen_size(image.shape[1], image.shape[2], vision.min_pixels, vision.max_pixels)
    picture = resize_for_vision(image.float(), size).movedim(0, -1)[None]
    tokens = _with_picture(clip.tokenize(text, llama_template=TEACHER_TEMPLATE)["qwen3_4b"], picture)
    device = clip.patcher.load_device
    comfy.model_management.load_models_gpu([clip.patcher, vision.patcher])
    with comfy.model_management.cuda_device_context(device), _config(language_model.model, vision.lm_config):
        holder: Any = SimpleNamespace(special_tokens={"pad": _PAD}, transformer=reader)
        embeds, mask, _, info = SDClipModel.process_tokens(holder, tokens, device)
        positions, is_picture, deepstack = reader.build_image_inputs(embeds, info)
        hidden = language_model.model(
            None,
            attention_mask=mask,
            embeds=embeds,
            intermediate_output=HIDDEN_LAYER,
            final_layer_norm_intermediate=False,
            dtype=torch.float32,
            position_ids=positions,
            visual_pos_masks=is_picture,
            deepstack_embeds=deepstack,
        )[1]
    return hidden[0, :MAX_TOKENS].float().cpu()


def seen_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width at which a picture is seen: multiples of 32 within the limits, aspect about kept.

    The rule of Qwen3-VL's own image processor; for one number of pixels the demo's (`vision_size`).
    """
    if min_pixels == max_pixels:
        return vision_size(height, width, min_pixels)
    cell, area = VISION_CELL, height * width
    rows, columns = round(height / cell), round(width / cell)
    if rows * columns * cell * cell > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / cell)) for side in (height, width))
    elif rows * columns * cell * cell < min_pixels:
        grow = math.sqrt(min_pixels / area)
        rows, columns = (math.ceil(side * grow / cell) for side in (height, width))
    return rows * cell, columns * cell


class _Reader:
    """ComfyUI's Qwen3-VL put together from two models: what `process_tokens` asks of one."""

    preprocess_embed = qwen3vl.Qwen3VL.preprocess_embed
    build_image_inputs = qwen3vl.Qwen3VL.build_image_inputs

    def __init__(self, language_model: Any, visual: nn.Module) -> None:
        self.visual, self.get_input_embeddings = visual, language_model.get_input_embeddings


def _language_model(clip: Any, vision: TeacherVision) -> Any:
    encoder = getattr(clip.cond_stage_model, "qwen3_4b", None)
    if encoder is None:
        raise ValueError("this CLIP is not Z-Image's text encoder: load qwen_3_4b with type lumina2")
    width, wanted = encoder.transformer.model.config.hidden_size, vision.lm_config.hidden_size
    if width != wanted:
        raise ValueError(
            f"the CLIP is {width} wide and the vision tower was made for one of {wanted}: "
            "use the demo model's CLIP and vision together, or qwen_3_4b with Qwen3-VL-4B"
        )
    return encoder.transformer


def _with_picture(tokens: Sequence[Sequence[tuple]], picture: Tensor) -> list[list[Any]]:
    """Token ids with the picture [1, H, W, 3] in the place of the template's mark, which is the first."""
    ids = [token[0] for token in tokens[0]]
    ids[ids.index(IMAGE_PAD)] = {"type": "image", "data": picture, "original_type": "image"}
    return [ids]


@contextmanager
def _config(model: Any, config: Any) -> Iterator[None]:
    before, model.config = model.config, config
    try:
        yield
    finally:
        model.config = before
