"""Reads safetensors files: plain tensors of single files, also of ComfyUI's fp8 files, and digests of contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...identity.tensor_digest import Content, digest_tensors

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".weight_scale", ".scale_weight")
_BESIDE = (*_SCALES, ".input_scale", ".scale_input", ".comfy_quant", "scaled_fp8")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def read_plain(
    files: Sequence[Path], dtype: torch.dtype | None, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Tensors in their own shapes by name, floating-point ones in `dtype`; None for the file's own, fp8 as fp32.

    fp8 weights are multiplied by their scales, under which names ComfyUI's files have them; prefixes of whole
    checkpoints are removed. wanted: of which names; scales follow their weights.

    Raises:
        ValueError: a file is damaged, or quantised otherwise.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    return {_bare(name): _plain(name, found, dtype, files[0]) for name in found if not name.endswith(_BESIDE)}


def read_shapes(files: Sequence[Path]) -> dict[str, Tensor]:
    """What `read_plain` reads, without values: tensors of the same names and shapes on the device meta.

    Raises:
        ValueError: a file is damaged, or quantised otherwise.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                kind = torch.int8 if part.get_dtype()[0] in "IU" else torch.float32
                found[name] = torch.empty(part.get_shape(), dtype=kind, device="meta")
    return {_bare(name): _plain(name, found, None, files[0]) for name in found if not name.endswith(_BESIDE)}


def digest_files(files: Sequence[Path], wanted: Callable[[str], bool] = lambda name: True) -> str:
    """16 hex digits of the tensors in the files, sampled as in `identity.tensor_digest`; of those with wanted names.

    Raises:
        ValueError: a file is damaged.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(file)) for file in files]
        tensors = {name: file.get_tensor(name) for file in opened for name in file.keys() if wanted(name)}  # noqa: SIM118
        names = sorted(tensors)
        contents = [Content(tensors[name]) for name in names]
        for name, part in zip(names, digest_tensors(contents), strict=True):
            digest.update(name.encode() + part)
    return digest.hexdigest()[:16]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as a safetensors file: download it again ({error})") from error


def _bare(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _plain(name: str, found: dict[str, Tensor], dtype: torch.dtype | None, file: Path) -> Tensor:
    value = found[name]
    if value.dtype in _FP8:
        layer = name.removesuffix(".weight")
        scale = next((found[layer + end] for end in _SCALES if layer + end in found), None)
        value = value.to(torch.float32) if scale is None else value.to(torch.float32) * scale.to(torch.float32)
    elif not value.is_floating_point() and name.endswith(".weight"):
        raise ValueError(f"{file} is quantised to {value.dtype}: use a bf16 or fp8 file, and --quantise to save memory")
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
