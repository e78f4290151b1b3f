"""Digests of tensors by their contents: small ones are read completely, large ones are sampled.

12 GB of weights must be distinguished in less than a second, and in a memory-mapped file every 64 KB read cost a page
fault. Another checkpoint, a merged LoRA or an ablation changes whole matrices, but an edit may change a single row (a
token's embedding) or column. So the sample contains a word of `WORD` adjacent elements in every row and in every block
of `WORD` columns, as long as all tensors together have at most `COVERED_BYTES`; beyond that, only every second,
third, ... stretch of `STRETCH_BYTES` is sampled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 4
"""Number of adjacent elements that are read together."""

WHOLE_BYTES = 2**20
"""Tensors up to this size in bytes are read completely: norms, biases, small models, most LoRAs."""

STRETCH_BYTES = 2**19
"""Size in bytes of the stretches that are sampled or skipped; only whole stretches save page faults."""

COVERED_BYTES = 2**33
"""Up to this total size in bytes, every row is sampled."""

_GLANCE_POINTS = 8
_BATCH_BYTES = 2**25  # gathered before it is copied to the CPU and hashed
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NoContentError(ValueError):
    """Raised for a tensor whose values cannot be read: without storage, or with an unsupported layout."""


@dataclass(frozen=True, eq=False)
class Content:
    """A tensor to digest.

    Attributes:
        tensor: a plain tensor of any shape and device.
        dtype: cast floating-point values to this dtype first; None for the tensor's own.
    """

    tensor: Tensor
    dtype: torch.dtype | None = None


def digest_tensors(contents: Sequence[Content], glance: bool = False) -> Iterator[bytes]:
    """Yields 32 bytes for each tensor, from its shape, dtype and sampled values; equal on every device.

    glance: sample only a few words of large tensors, which is fast but does not detect every change.

    Raises:
        NoContentError: a tensor cannot be read.
    """
    total = sum(content.tensor.numel() * content.tensor.element_size() for content in contents)
    step = max(1, math.ceil(total / COVERED_BYTES))
    heads: list[str] = []
    samples: list[Tensor] = []
    gathered = 0
    for content in contents:
        heads.append(_head(content))
        samples.append(_sample(content, None if glance else step))
        gathered += len(samples[-1])
        if gathered >= _BATCH_BYTES:
            yield from _hashed(heads, samples)
            heads, samples, gathered = [], [], 0
    yield from _hashed(heads, samples)


# -- which values ------------------------------------------------------------------------------------------------------


def _sample(content: Content, step: int | None) -> Tensor:
    """uint8 [k] on the tensor's device. step: sample every `step`th stretch; None for a glance."""
    tensor = _readable(content.tensor)
    if tensor.numel() * tensor.element_size() <= WHOLE_BYTES:
        return _as_bytes(tensor, content.dtype)
    places, word = _few_places(tensor) if step is None else _places(tensor, step)
    flat = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    words = flat[: len(flat) // word * word].view(-1, word)
    return _as_bytes(words.index_select(0, places.to(tensor.device)).view(tensor.dtype), content.dtype)


def _readable(tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise NoContentError(f"the values of a tensor of {tensor.device}, {tensor.layout} cannot be read")
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _few_places(tensor: Tensor) -> tuple[Tensor, int]:
    """Indices of the first word, the last word and some between, and the word length."""
    last = tensor.numel() // WORD - 1
    return torch.tensor([last * point // (_GLANCE_POINTS - 1) for point in range(_GLANCE_POINTS)]), WORD


def _places(tensor: Tensor, step: int) -> tuple[Tensor, int]:
    """Indices of words that cover each row and each block of columns in every `step`th stretch, and the word length.

    Adjacent rows sample distant blocks.
    """
    rows, columns = _as_matrix(tensor)
    word = WORD if columns % WORD == 0 else 1
    blocks = columns // word
    number = torch.arange(max(rows, blocks))
    row = number % rows
    if step > 1:
        stretch = row * (columns * tensor.element_size()) // STRETCH_BYTES
        kept = (stretch % step == 0) | (row == rows - 1)
        number, row = number[kept], row[kept]
    return row * blocks + number * _stride(blocks) % blocks, word


def _as_matrix(tensor: Tensor) -> tuple[int, int]:
    """(rows, columns): the split of the shape with the fewest words; a vector is split into rows of 1024."""
    if tensor.ndim == 1:
        return tensor.numel() // 1024, 1024
    splits = [(math.prod(tensor.shape[:k]), math.prod(tensor.shape[k:])) for k in range(1, tensor.ndim)]
    return min(splits, key=lambda split: max(split[0], split[1] // WORD))


def _stride(blocks: int) -> int:
    """A stride near the golden section of `blocks` and coprime to it, which visits every block once."""
    stride = max(1, round(blocks * 0.618))
    while math.gcd(stride, blocks) != 1:
        stride += 1
    return stride


def _as_bytes(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and values.is_floating_point():
        values = values.to(dtype)
    return values.contiguous().reshape(-1).view(torch.uint8)


# -- hashing -----------------------------------------------------------------------------------------------------------


def _head(content: Content) -> str:
    tensor = content.tensor
    dtype = content.dtype if content.dtype is not None and tensor.is_floating_point() else tensor.dtype
    return f"{tuple(tensor.shape)}|{dtype}|"


def _hashed(heads: Sequence[str], samples: Sequence[Tensor]) -> Iterator[bytes]:
    """Hashes the samples with one copy to the CPU per device."""
    devices = dict.fromkeys(sample.device for sample in samples)
    here = {device: torch.cat([s for s in samples if s.device == device]).cpu().numpy() for device in devices}
    begins = dict.fromkeys(devices, 0)
    for head, sample in zip(heads, samples, strict=True):
        begin = begins[sample.device]
        begins[sample.device] = end = begin + len(sample)
        yield hashlib.sha256(head.encode() + here[sample.device][begin:end].tobytes()).digest()
