"""A scaled-down Qwen3-VL-4B: its vision tower, files of it in every layout, CLIPs that go with it, transformers' own.

Import only after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import toy
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 48
LANGUAGE = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
TOWER = {
    "hidden_size": 64, "intermediate_size": 96, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_heads": 2,
    "num_position_embeddings": 36, "out_hidden_size": WIDTH,
}  # fmt: skip
OTHERS = {"model.language_model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(3, 2)}
"""What a file has besides the tower; it must not be read."""


def tiny(vision: Any) -> Any:
    """The real tower's layout at toy sizes, as a VisionSpec."""
    real = vision.qwen3vl_4b()
    config = dataclasses.replace(real.lm_config, hidden_size=WIDTH)
    return dataclasses.replace(real, tower={**real.tower, **TOWER}, lm_config=config)


def reference(spec: Any) -> tuple[Any, dict[str, Tensor]]:
    """transformers' tower with weights that bf16 holds exactly, and its tensors."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**spec.tower)).eval()
    state = {name: (value + 0.02 * torch.randn_like(value)).bfloat16() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model, state


# -- files ------------------------------------------------------------------------------------------------------------


def in_a_file(path: Path, state: dict[str, Tensor], prefix: str = "model.visual.", **metadata: str) -> Path:
    save_file({**_named(state, prefix), **OTHERS}, path, metadata)
    return path


def in_several(folder: Path, state: dict[str, Tensor], *metadata: dict[str, str]) -> list[Path]:
    """As Hugging Face lays it out: the tower in the first two of three files, and the index.

    metadata: of the files' headers, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    named, others = list(_named(state, "model.visual.").items()), list(OTHERS.items())
    half = len(named) // 2
    places = {}
    parts = (named[:half] + others[:1], named[half:], others[1:])
    for path, part, header in zip(paths, parts, (*metadata, {}, {}, {}), strict=False):
        save_file(dict(part), path, header)
        places |= {name: path.name for name, _ in part}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return paths


def _named(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name if name == "scaled_fp8" else prefix + name: value for name, value in state.items()}


# -- who reads --------------------------------------------------------------------------------------------------------


def clip(kind: str) -> Any:
    """The stock CLIP of "z_image" or "klein" with a small Qwen3-4B in it, or "klein_9b" with a small Qwen3-8B."""
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import flux, z_image

    target, name, layers = {
        "z_image": (ClipTarget(z_image.ZImageTokenizer, z_image.te()), "qwen3_4b", 5),
        "klein": (ClipTarget(flux.KleinTokenizer, flux.klein_te()), "qwen3_4b", 28),
        "klein_9b": (ClipTarget(flux.KleinTokenizer8B, flux.klein_te(model_type="qwen3_8b")), "qwen3_8b", 28),
    }[kind]
    sizes = {**LANGUAGE, "num_hidden_layers": layers}
    with toy.allocated():
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, f"{name}_model_config": sizes})
    toy.fill(clip.cond_stage_model)
    return clip


def transformers_reader(clip: Any, tower: Any, spec: Any) -> Any:
    """transformers' Qwen3-VL of this tower, its language weights exchanged for those of the CLIP."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    model = clip.cond_stage_model.qwen3_4b.transformer.model
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    sizes: dict[str, Any] = {**LANGUAGE, "num_hidden_layers": len(model.layers), "vocab_size": 151936, "head_dim": 128}
    whole = Qwen3VLModel(
        Qwen3VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=dict(spec.tower))
    ).eval()
    whole.visual.load_state_dict(tower.state_dict())
    whole.language_model.load_state_dict(model.state_dict())
    return whole.requires_grad_(False)
