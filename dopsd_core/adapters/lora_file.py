"""Reads and writes LoRA files that ComfyUI and diffusers load at equal strength.

Keys are `<prefix><diffusers module>.lora_A.weight` [rank, in] and `.lora_B.weight` [rows, rank]. alpha / rank is
multiplied into lora_B, and there are no `.alpha` keys: loaders disagree about them, while a missing one means a scale
of 1 everywhere.

In memory, "raw" tensors are those of `AdapterSet.state`; "folded" tensors have alpha / rank multiplied into B, as in
the files.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as format_safetensors
from torch import Tensor

from ..files.atomic import write_atomic
from ..files.disk import writing
from ..sharing.tensor_hash import has_hash, tensor_hash
from ..text import printable
from .lora import Lora

PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")
_PEFT_PREFIX = "base_model.model."
_PEFT_CONFIG = "adapter_config.json"
_SUFFIXES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_down": "lora_A", "lora_up": "lora_B"}
_KEY = re.compile(r"(?P<part>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up)(\.(?P<adapter>\w+))?\.weight")

_SCALED = re.compile(r"\.lora_B\.|\.lokr_w2(_a)?$")
_FULL_PRECISION = re.compile(r"\.(lora_magnitude_vector|dora_scale)$")  # rounded, they would be noise on the base

_MAX_SHOWN = 120
_MAX_PATTERN, _MAX_REPEATS = 500, 4
_REPEATS = re.compile(r"[*+{]")  # each may multiply the matching time by the length of the name
_NESTED = re.compile(r"\)[*+{]")  # a repeated group may take exponential time


def fold_alpha(tensors: Mapping[str, Tensor], config: Lora) -> dict[str, Tensor]:
    """Raw -> folded: multiplies lora_B [rows, rank], or LoKr's w2 or w2_a, by alpha / rank; others are unchanged."""
    scale = config.scale
    return {key: t * scale if scale != 1 and _SCALED.search(key) else t for key, t in tensors.items()}


def unfold_alpha(tensors: Mapping[str, Tensor], config: Lora) -> dict[str, Tensor]:
    """Folded -> raw, for `AdapterSet.load_state` of a set with this config; fp32, the same shapes."""
    return {key: t.float() / config.scale if _SCALED.search(key) else t.float() for key, t in tensors.items()}


def save_lora(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    config: Lora,
    *,
    prefix: str = "transformer.",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes raw `tensors` (`AdapterSet.state()`) as one LoRA file, atomically.

    Args:
        tensors: those of a `SiteWeights`, such as "<part>.lora_A.weight" [rank, in]; DoRA's magnitudes stay in fp32.
        metadata: for the header (`modelspec.*`, `ss_*`, `dopsd_*`); loaders ignore it. Some get a hash (`has_hash`).

    Raises:
        ValueError: no tensors, a non-finite one, or metadata that would change the strength in diffusers.
        DiskError: the folder cannot be written; an older file is untouched.
    """
    if not tensors:
        raise ValueError("there is no LoRA to save: the set of tensors is empty")
    if "lora_adapter_metadata" in (metadata or {}):
        raise ValueError("metadata may not hold 'lora_adapter_metadata': diffusers would apply alpha a second time")
    path = Path(path)
    header = {"format": "pt", **{key: printable(value) for key, value in (metadata or {}).items()}}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    stored = _file_tensors(tensors, config, prefix, dtype)
    data = format_safetensors(stored, header)
    write_atomic(path, format_safetensors(stored, header | tensor_hash(data)) if has_hash(header) else data)


def load_lora(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(folded tensors in the file's dtype, the header's metadata) of a LoRA file.

    Tensors are under bare part names: "<part>.lora_A.weight" [rank, in], "<part>.lora_B.weight" [rows, rank]. Reads
    what `save_lora` writes, other prefixes, lora_down / lora_up, and `.alpha` keys, which are folded in here.

    Raises:
        ValueError: it is not a safetensors file, or its keys are not a LoRA under diffusers' module names.
        FileNotFoundError: there is no such file.
    """
    tensors, metadata = read_safetensors(Path(path))
    return _folded(tensors, path, lambda part, rank: 1.0), metadata


def save_peft(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    config: Lora,
    *,
    base_model: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes raw `tensors` ([rank, in], [rows, rank]) as a peft folder for `PeftModel.from_pretrained`.

    peft writes adapter_config.json. alpha is folded here too (lora_alpha = r in the config), so that the weights keep
    their strength without the config.

    Raises:
        ImportError: peft is not installed.
        DiskError: the folder cannot be written; a new one is not left behind half filled.
    """
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError as error:
        raise ImportError("exporting a peft folder needs peft: pip install peft") from error
    parts = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    # A regular expression over full names: peft reads a list as suffixes, and one name may be the suffix of another.
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules="|".join(re.escape(part) for part in parts),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights="gaussian",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    data = format_safetensors(_file_tensors(tensors, config, _PEFT_PREFIX, dtype), {"format": "pt"})
    _write_peft(Path(folder), data, peft_config)


def _write_peft(folder: Path, weights: bytes, peft_config: Any) -> None:
    is_new = not folder.exists()
    try:
        with writing(folder, len(weights)):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as draft:  # peft writes in place
                peft_config.save_pretrained(draft)
                written = (Path(draft) / _PEFT_CONFIG).read_bytes()
            write_atomic(folder / _PEFT_CONFIG, written)
            write_atomic(folder / "adapter_model.safetensors", weights)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def load_peft(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(folded tensors under bare part names, facts of the config) of a peft folder or a reference script's checkpoint.

    Tensors are [rank, in] for lora_A and [rows, rank] for lora_B.

    Raises:
        ValueError: a file is missing or damaged, or the adapter cannot be expressed as plain LoRA weights.
    """
    folder = Path(folder)
    path = folder / _PEFT_CONFIG
    try:
        config = parse_json_object(path.read_bytes(), path)
        tensors, _ = read_safetensors(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} needs adapter_config.json and adapter_model.safetensors: {error}") from error
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise ValueError(f"{folder}: {option} is set; only plain LoRA can be imported")

    def scale(part: str, rank: int) -> float:
        return peft_scale(config, part, rank, path)

    facts = {"base_model": str(config.get("base_model_name_or_path") or ""), "rank": str(config.get("r", ""))}
    return _folded(tensors, folder, scale), facts


# -- checks while reading ----------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name in their own shapes, metadata of the header) of a safetensors file.

    Raises:
        ValueError: it is not a safetensors file.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from error


def parse_json_object(text: str | bytes, source: Path | str) -> dict[str, Any]:
    """Parses the JSON object that accompanies a LoRA's weights.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: the configuration of the LoRA is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{source}: the configuration of the LoRA is not a JSON object")
    return parsed


def alpha_of(key: str, tensor: Tensor, source: Path | str) -> float:
    """The value of a scalar tensor `<module>.alpha`, of one element in any shape.

    Raises:
        ValueError: it is not a single finite number.
    """
    if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        raise ValueError(f"{source}: {shown(key)} is {kind}, it must be a single number")
    alpha = float(tensor.float().item())
    if not math.isfinite(alpha):
        raise ValueError(f"{source}: {shown(key)} is {alpha}, it must be a finite number")
    return alpha


def check_pair(module: str, a: Tensor, b: Tensor, source: Path | str) -> None:
    """Checks A [rank, in, ...] and B [rows, rank, ...] of one module.

    Raises:
        ValueError: they are not finite floating-point matrices of the same rank.
    """
    shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)} of {shown(module)}"
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"{source} is damaged: {shapes}, which should be (rank, inputs) and (outputs, rank)")
    for tensor in (a, b):
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {shown(module)} is {tensor.dtype}; a LoRA needs floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{source} is not finite in {shown(module)}")


def scaled(module: str, b: Tensor, factor: float, source: Path | str) -> Tensor:
    """B [rows, rank] times `factor`, in fp32 unless the factor is 1.

    Raises:
        ValueError: the product is not finite.
    """
    product = b if factor == 1 else b.float() * factor
    if not torch.isfinite(product.float()).all():
        raise ValueError(f"{source}: alpha is too large in {shown(module)}")
    return product


def peft_scale(config: Mapping[str, Any], part: str, rank: int, source: Path | str) -> float:
    """peft's scale of a part: alpha / rank, or alpha / sqrt(rank) with rslora.

    Raises:
        ValueError: the configuration has no valid alpha.
    """
    patterns = config.get("alpha_pattern")
    alpha = by_pattern(patterns if isinstance(patterns, dict) else {}, part, config.get("lora_alpha"), source)
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) < 1e30:
        raise ValueError(f"{source}: lora_alpha or alpha_pattern of {shown(part)} is {shown(alpha)}, no valid number")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def by_pattern(patterns: Mapping[str, Any], part: str, default: Any, source: Path | str) -> Any:
    """The value of the first pattern that matches the name or a dotted suffix of it, as in peft.

    Raises:
        ValueError: a pattern is not a regular expression, or one that may take too long to match.
    """
    for pattern, value in patterns.items():
        if len(pattern) > _MAX_PATTERN or len(_REPEATS.findall(pattern)) > _MAX_REPEATS or _NESTED.search(pattern):
            raise ValueError(f"{source}: the pattern {shown(pattern)} of alpha_pattern is too complicated")
        try:
            if re.match(rf"(.*\.)?({pattern})$", part):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{source}: {shown(pattern)} of alpha_pattern is not a regular expression: {error}"
            ) from error
    return default


def shown(value: object) -> str:
    """A key or value of a file, quoted and shortened for a message."""
    text = repr(value if isinstance(value, int | float) else str(value)[: _MAX_SHOWN + 1])
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


# -- helpers -----------------------------------------------------------------------------------------------------------


def _file_tensors(tensors: Mapping[str, Tensor], config: Lora, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():  # torch: not for 8-bit floats
            raise ValueError(f"{key} is not finite; the LoRA is not saved")
    folded = fold_alpha(tensors, config)
    kinds = {key: torch.float32 if _FULL_PRECISION.search(key) else dtype for key in folded}
    return {prefix + key: folded[key].detach().to("cpu", kinds[key]).contiguous() for key in sorted(folded)}


def _folded(tensors: Mapping[str, Tensor], source: Path | str, scale: Any) -> dict[str, Tensor]:
    """Bare names and lora_A / lora_B, with scale and `.alpha` multiplied into B. scale: (part, rank) -> factor."""
    alphas = {
        _bare(key.removesuffix(".alpha")): alpha_of(key, tensor, source)
        for key, tensor in tensors.items()
        if key.endswith(".alpha")
    }
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            continue
        match = _KEY.fullmatch(_bare(key))
        if match is None:
            raise ValueError(f"{source}: key {shown(key)} does not belong to a LoRA under diffusers' module names")
        pair = found.setdefault(match["part"], {})
        if pair.setdefault(_SUFFIXES[match["kind"]], tensor) is not tensor:
            raise ValueError(f"{source} holds several LoRAs: {shown(key)} is the second of its kind")
    result: dict[str, Tensor] = {}
    for part, pair in found.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(
                f"{source}: {shown(part)} has only {' and '.join(sorted(pair))}; it needs lora_A and lora_B"
            )
        check_pair(part, pair["lora_A"], pair["lora_B"], source)
        rank = pair["lora_A"].shape[0]
        factor = alphas[part] / rank if part in alphas else scale(part, rank)
        result[f"{part}.lora_A.weight"] = pair["lora_A"]
        result[f"{part}.lora_B.weight"] = scaled(part, pair["lora_B"], factor, source)
    if not result:
        raise ValueError(f"{source} contains no LoRA weights")
    return result


def _bare(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key
