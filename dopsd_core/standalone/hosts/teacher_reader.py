"""The teacher's vision: Qwen3-VL's vision tower with the model's own language weights, in transformers.

The text encoder of Z-Image and FLUX.2-klein 4B is Qwen3-4B, the language model that Qwen3-VL-4B was trained from. With
the vision tower and Qwen3-VL's rotary positions it reads an image together with its caption. Its language weights are
those of the text encoder, the same tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...conditioning.seen_size import MAX_PIXELS, MIN_PIXELS, seen_size
from ...demo.model_files import IMAGE_PAD, VISION_CELL
from .qwen3vl import image_patches
from .source import fetch, is_hub_id, weight_files
from .weight_files import digest_files, read_plain

MAX_TOKENS = 1024
"""Maximum number of tokens of image and caption together; the image's come first."""

_PREFIXES = ("model.visual.", "visual.")
_CONFIG = "config.json"
_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_QWEN3VL_4B: Mapping[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2560, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
"""For single files, which have no configuration beside them."""


@dataclass(frozen=True)
class VisionFiles:
    """The local files of a vision tower.

    Attributes:
        files: with its weights, maybe with others.
        tower: its configuration.
        rope: rotary positions of the language model that reads an image.
    """

    files: tuple[Path, ...]
    tower: Mapping[str, Any]
    rope: Mapping[str, Any]

    def digest(self) -> str:
        """16 hex digits of its weights and configuration."""
        facts = [digest_files(self.files, is_vision), dict(self.tower), dict(self.rope)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def is_vision(name: str) -> bool:
    """Whether the tensor of this name belongs to the vision tower."""
    return name.startswith(_PREFIXES)


def find_vision(place: str) -> VisionFiles:
    """The files of a vision tower in a file, a folder or under a Hugging Face id; of an id, only those that have it.

    Raises:
        ValueError: it is another model.
        OSError: files are missing or cannot be downloaded.
    """
    path = Path(place)
    if path.is_file():
        config = path.with_name(_CONFIG)
        return _vision_files((path,), config if config.is_file() else None, place)
    if path.is_dir():
        return _vision_files(weight_files(path), path / _CONFIG, place)
    if not is_hub_id(place):
        raise FileNotFoundError(f"{place} does not exist; --vision takes a file, a folder or a Hugging Face id")
    config = Path(fetch(place, lambda hub: hub.hf_hub_download(place, _CONFIG)))
    index = Path(fetch(place, lambda hub: hub.hf_hub_download(place, "model.safetensors.index.json")))
    names = sorted({file for name, file in json.loads(index.read_bytes())["weight_map"].items() if is_vision(name)})
    files = [Path(fetch(place, lambda hub, name=name: hub.hf_hub_download(place, name))) for name in names]
    return _vision_files(tuple(files), config, place)


class TeacherReader:
    """Reads an image with a caption.

    Args:
        text_encoder: transformers' Qwen3Model, whose weights are shared.
        vision: the vision tower's files.
        dtype: of the tower.

    Attributes:
        model: transformers' Qwen3VLModel.

    Raises:
        ValueError: the tower does not belong to this text encoder, or its weights are incomplete.
    """

    def __init__(self, text_encoder: Any, vision: VisionFiles, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import Qwen3VLConfig, Qwen3VLModel

        width, output = text_encoder.config.hidden_size, vision.tower["out_hidden_size"]
        if width != output:
            raise ValueError(
                f"the text encoder is {width} wide and the vision tower was made for one of {output}: use Qwen3-VL-4B "
                "with Z-Image-Turbo and FLUX.2-klein 4B; for klein 9B choose --teacher-view edit"
            )
        own = text_encoder.config.to_dict()
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "vocab_size", "rms_norm_eps", "hidden_act")  # fmt: skip
        language = {name: own[name] for name in kept} | {"rope_parameters": dict(vision.rope)}
        with init_empty_weights():
            self.model: Any = Qwen3VLModel(Qwen3VLConfig(text_config=language, vision_config=dict(vision.tower)))
        self.model.eval().requires_grad_(False)
        _share(self.model.language_model, text_encoder)
        _load(self.model.visual, vision, dtype)

    @torch.no_grad()
    def read(
        self, image: Tensor, ids: Sequence[int], ending: int, least: int, pad: int, states: Sequence[int]
    ) -> Tensor:
        """Hidden states [L, len(states) * D] of image [3, H, W] in [0, 1] and token ids with one image token.

        Args:
            ending: number of tokens at the end that are never cut off.
            least: shorter texts are padded to this length with `pad`.
            states: indices of the hidden states.
        """
        size = seen_size(image.shape[1], image.shape[2], MIN_PIXELS, MAX_PIXELS)
        patches, grid = image_patches(image, size)
        rows = _expanded(list(ids), size[0] * size[1] // VISION_CELL**2, ending)
        padding = max(0, least - len(rows))
        tokens = torch.tensor([rows + [pad] * padding])
        mask = torch.tensor([[1] * len(rows) + [0] * padding])
        is_image = (tokens == IMAGE_PAD).long()
        # Positions are given: transformers counts none for padding, and both families' text encoders do.
        positions, _ = self.model.get_rope_index(tokens, is_image, grid)
        device = self.model.visual.device
        out = self.model(
            input_ids=tokens.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
            mm_token_type_ids=is_image.to(device), pixel_values=patches.to(device), image_grid_thw=grid.to(device),
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
        return torch.cat([out.hidden_states[state][0] for state in states], dim=-1)


def _expanded(ids: list[int], cells: int, ending: int) -> list[int]:
    """The ids with `cells` image tokens for the one; of a text that is too long, the end before `ending` is cut."""
    place = ids.index(IMAGE_PAD)
    over = len(ids) + cells - 1 - MAX_TOKENS
    if over > 0:
        end = len(ids) - ending
        del ids[max(end - over, place + 2) : end]
    return [*ids[:place], *[IMAGE_PAD] * cells, *ids[place + 1 :]]


def _share(language_model: nn.Module, text_encoder: nn.Module) -> None:
    """Gives a language model the parameters of a text encoder, the same objects."""
    parameters = dict(text_encoder.named_parameters())
    own = {name for name, _ in language_model.named_parameters()}
    if own != parameters.keys():
        raise ValueError("the text encoder is not Qwen3, which the vision tower belongs to")
    for name, parameter in parameters.items():
        parent, _, leaf = name.rpartition(".")
        setattr(language_model.get_submodule(parent), leaf, parameter)


def _load(visual: nn.Module, vision: VisionFiles, dtype: torch.dtype) -> None:
    """Loads the tower's weights in `dtype`."""
    read = read_plain(vision.files, dtype, is_vision)
    state = {name.removeprefix("model.").removeprefix("visual."): value for name, value in read.items()}
    try:
        visual.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{vision.files[0]} is not the vision tower of its configuration: {reason}") from error
    visual.requires_grad_(False)


def _vision_files(files: tuple[Path, ...], config: Path | None, place: str) -> VisionFiles:
    if config is None:
        return VisionFiles(files, _QWEN3VL_4B, _ROPE)
    try:
        found = json.loads(config.read_bytes())
        tower, text = found["vision_config"], found["text_config"]
        rope = text.get("rope_parameters") or {  # before transformers 5
            **(text.get("rope_scaling") or {}), "rope_theta": text.get("rope_theta", _ROPE["rope_theta"])
        }  # fmt: skip
    except OSError as error:
        raise FileNotFoundError(f"{place} has no {_CONFIG}: download the model again") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{place} is not Qwen3-VL: its {_CONFIG} describes no vision tower") from error
    wanted = {name: tower[name] for name in _QWEN3VL_4B if name in tower}
    return VisionFiles(files, wanted, {**_ROPE, **rope})
