"""Checks by names, shapes and configurations that the parts of a model belong together, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .source import ModelFiles, read_json
from .weight_files import read_shapes


def require_transformer(files: ModelFiles, cls: Any) -> None:
    """Checks the transformer's files against its configuration; cls: its class in diffusers.

    Raises:
        ValueError: they are damaged, incomplete or of another model.
    """
    folder, network = files.base / "transformer", empty_transformer(files, cls)
    if files.transformer is None and "quantization_config" in read_config(folder):
        return  # its tensors are packed
    wanted, found = network.state_dict(), read_shapes(files.weights("transformer"))
    if files.transformer is not None:
        found = _renamed(cls, found, wanted, files.transformer)
    _require_all(files.transformer or folder, found, wanted)


def empty_transformer(files: ModelFiles, cls: Any) -> Any:
    """The transformer of its configuration without values, on the device meta; cls: its class in diffusers.

    Raises:
        ValueError: the configuration is damaged, or of another model.
    """
    from accelerate import init_empty_weights

    folder = files.base / "transformer"
    config = read_config(folder)
    found_class = config.get("_class_name", cls.__name__)
    if found_class != cls.__name__:
        raise ValueError(
            f"{folder} is a {found_class}, and this model needs a {cls.__name__}: download the model again"
        )
    try:
        with init_empty_weights():
            return cls.from_config({name: value for name, value in config.items() if name != "quantization_config"})
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}/config.json describes no {cls.__name__}: download the model again") from error


def require_qwen3vl(files: ModelFiles, width: str, layers: int) -> None:
    """Checks that the text encoder is a Qwen3-VL with its vision tower, of the transformer's width.

    Args:
        width: key of the transformer's configuration.
        layers: the smallest number of layers that it needs.

    Raises:
        ValueError: it is another model, or has no vision tower.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    folder = files.base / "text_encoder"
    config, wanted = read_config(folder), read_config(files.base / "transformer").get(width)
    if config.get("model_type") != "qwen3_vl":
        raise ValueError(
            f"{folder} is a {config.get('model_type')}, and this model needs Qwen3-VL: choose another folder"
        )
    text = config.get("text_config", {})
    found, depth = text.get("hidden_size"), text.get("num_hidden_layers", layers)
    if (wanted is not None and found != wanted) or depth < layers:
        raise ValueError(
            f"{folder} is {found} wide with {depth} layers, and the transformer needs one {wanted} wide with at least "
            f"{layers}: it is the text encoder of another model, download this one's again"
        )
    place, shapes = files.text_encoder or folder, read_shapes(files.weights("text_encoder"))
    if not any("visual." in name for name in shapes):
        raise ValueError(f"{place} has no vision tower, which the teacher sees with: use a whole Qwen3-VL")
    if files.text_encoder is not None:
        with init_empty_weights():
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        _require_all(place, {name.removeprefix("model."): value for name, value in shapes.items()}, model.state_dict())


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of a part.

    Raises:
        ValueError: it is no JSON object.
    """
    return read_json(folder / "config.json")


def _renamed(cls: Any, found: dict[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> Mapping[str, Tensor]:
    """A single file's tensors [...] under diffusers' names, as `from_single_file` renames them."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if wanted.keys() <= found.keys():
        return found
    try:
        return SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"](checkpoint=dict(found), config={})
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{file} does not have the layout of this model's file: download it again") from error


def _require_all(place: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Every wanted tensor is there in its shape [...]."""
    missing = [name for name in wanted if name not in found]
    if len(missing) == len(wanted):
        raise ValueError(
            f"{place} is of another model, or has its tensors under other names, such as {next(iter(found), 'none')}: "
            "use this model's own file"
        )
    if missing:
        raise ValueError(
            f"{place} lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}: it is incomplete or of "
            "another model, download it again"
        )
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{place} is of another model than its config.json: {name} has the shape {list(found[name].shape)} "
                f"instead of {list(value.shape)}"
            )
