"""Loads the vision tower from Qwen3-VL's files: one file, or several with their index.

Only the tower is read, about a tenth of the data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from typing import Any

import comfy.ops
import comfy.utils
import torch
from comfy.text_encoders import qwen3vl
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .vision import TeacherVision, VisionSpec, new_vision, qwen3vl_4b

_PREFIXES = ("model.visual.", "visual.")
_NO_JSON = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What comes of reading JSON that is none, or holds something else than it should."""

_ONE_OF_SEVERAL = re.compile(r"(.+)-\d{5}-of-(?!00001\.)\d{5}\.safetensors")


def load_teacher_vision(path: str | Path, spec: VisionSpec | None = None) -> TeacherVision:
    """The vision tower of a safetensors file, plain or quantised, or of all files of a split model.

    Raises:
        ValueError: the files contain another model or only a part; the message says what was expected and found.
    """
    spec, path, dtype = spec or qwen3vl_4b(), Path(path), torch.bfloat16
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(_open(part)) for part in tower_files(path)]
            names = [(file, full) for file in files for full in file.keys()]  # noqa: SIM118  no mapping
            tower = {short: (file, full) for file, full in names if (short := _short_name(full))}
            _refuse_others(path.name, {s: file.get_slice(full).get_shape() for s, (file, full) in tower.items()}, spec)
            state = {short: file.get_tensor(full) for short, (file, full) in tower.items()}
            metadata = _tower_metadata(path.name, [file.metadata() or {} for file in files])
        state, _ = comfy.utils.convert_old_quants(state, "", metadata)
        ops = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True)
        return new_vision(_in_dtype(state, dtype), spec, ops, dtype)
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f"{path.name} cannot be read as the vision tower of {spec.title}: {str(e)[:300]}") from e


def tower_files(path: Path) -> list[Path]:
    """The files that contain the tower: `path`, or for a split model those that the index names.

    Raises:
        ValueError: the index or one of the files is missing, or the index is invalid.
    """
    if not (name := _ONE_OF_SEVERAL.fullmatch(path.name)):
        return [path]
    index = path.with_name(f"{name[1]}.safetensors.index.json")
    if not index.is_file():
        raise ValueError(
            f"{path.name} is one of several files, and their index {index.name} is not beside it: put all "
            "files of the model into one folder below models/text_encoders"
        )
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        parts = sorted({str(part) for tensor, part in places.items() if _short_name(tensor)})
    except _NO_JSON as e:
        raise ValueError(
            f"{index.name} beside {path.name} is not an index of safetensors files: download it again"
        ) from e
    for part in parts:
        # Windows paths cover every way out of a folder: /, \ and drives
        if PureWindowsPath(part).name != part or not part.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {part[:200]!r}, which is no file of its own folder: download again")
        if not os.path.isfile(path.with_name(part)):  # Path.is_file raises for a name that is too long
            raise ValueError(
                f"the vision tower is in {part[:200]} by {index.name}, and that file is not beside it: download it too"
            )
    return [path.with_name(part) for part in parts]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as e:
        raise ValueError(f"{path.name} cannot be read as a safetensors file, download it again: {str(e)[:300]}") from e


def _short_name(name: str) -> str:
    """The name inside the tower, or "" for other tensors. `scaled_fp8` marks an older fp8 layout."""
    if name == "scaled_fp8":
        return name
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), "")


def _refuse_others(name: str, shapes: Mapping[str, Sequence[int]], spec: VisionSpec) -> None:
    wanted = _describe(spec.tower["hidden_size"], spec.tower["depth"], spec.tower["deepstack_visual_indexes"])
    wanted += f", output {spec.tower['out_hidden_size']}"
    inside = [key for key in shapes if key != "scaled_fp8"]
    if not inside:
        found = "no vision tower at all (no `visual.*` tensors)"
    elif not (shapes.get("pos_embed.weight") and shapes.get("merger.linear_fc2.weight")):  # missing, or a single number
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
    # torch's own layers: under dynamic VRAM ComfyUI's have no weights before a load, and take any shape in it
    meta = qwen3vl.Qwen3VLVisionModel(dict(spec.tower), device="meta", dtype=torch.bfloat16, ops=nn)
    real = {key: list(value.shape) for key, value in meta.state_dict().items()}
    if missing := sorted(real.keys() - shapes.keys()):
        raise ValueError(
            f"{name} has only a part of the vision tower of {spec.title} ({len(missing)} tensors such as "
            f"visual.{missing[0]} are missing): download all of its files again"
        )
    quantised = {key.rpartition(".")[0] for key in shapes.keys() - real.keys()}  # those may be packed
    for key, shape in real.items():
        if list(shapes[key]) != shape and key.rpartition(".")[0] not in quantised:
            raise ValueError(
                f"{name} is not {spec.title}: size mismatch of visual.{key}, expected {shape}, found "
                f"{list(shapes[key])}. Choose a file of {spec.title} with vision"
            )


def _describe(width: int, blocks: int, deepstack: Iterable[object]) -> str:
    return f"width {width}, {blocks} blocks, {len(list(deepstack))} DeepStack mergers"


def _indices(names: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}


def _tower_metadata(name: str, headers: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Which layers are quantised may stand in the headers, under the files' own names."""
    key = "_quantization_metadata"
    try:
        found = [json.loads(header[key])["layers"] for header in headers if key in header]
        layers = {short: kind for part in found for full, kind in part.items() if (short := _short_name(full))}
    except _NO_JSON as e:
        raise ValueError(f"the header of {name} holds a {key} that cannot be read: download the file again") from e
    return {key: json.dumps({"layers": layers})} if found else {}


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors in `dtype`, except the quantised layers."""
    quantised = {name.removesuffix(".comfy_quant") for name in state if name.endswith(".comfy_quant")}
    return {
        name: value.to(dtype) if value.is_floating_point() and name.rpartition(".")[0] not in quantised else value
        for name, value in state.items()
    }
