"""Digests of tensors by their contents: small ones whole, large ones by a sample.

12 GB of weights have to be told apart in less than a second, and where they are a mapped file, every 64 KB that are
touched cost a page fault. What is to be told apart decides where the sample lies: another checkpoint, a merged LoRA or
an ablation changes whole matrices, but an edit may change one row (a token's embedding) or one column. So there is a
word of `WORD` neighbouring elements in every row and in every block of `WORD` columns, as long as all tensors together
have at most `COVERED_BYTES`; of more, it is every second, third, ... stretch of `STRETCH_BYTES` that is sampled so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 4
"""Neighbouring elements that are read together."""

WHOLE_BYTES = 2**20
"""A tensor of at most so many bytes is read whole: norms, biases, small models, most LoRAs."""

STRETCH_BYTES = 2**19
"""Length of what is sampled or passed over as a whole: page faults are saved by whole stretches only."""

COVERED_BYTES = 2**33
"""Tensors of so many bytes together are sampled in each of their rows."""

_GLANCE_POINTS = 8
_BATCH_BYTES = 2**25  # what is gathered before it is brought to the CPU and hashed
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NoContentError(ValueError):
    """A tensor whose values cannot be read: without storage, or of a layout that is not known here."""


@dataclass(frozen=True, eq=False)
class Content:
    """A plain tensor of any device, and the dtype that its values count in; None for its own."""

    tensor: Tensor
    dtype: torch.dtype | None = None


def digest_tensors(contents: Sequence[Content], glance: bool = False) -> Iterator[bytes]:
    """32 bytes for each tensor, of its shape, its dtype and its sampled values; equal on every device.

    glance: of large tensors take a few words only, so that next to nothing is read. It does not notice every change.

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
    """uint8 [k] on the tensor's device. step: which of the stretches to sample; None for a glance."""
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
    """The first and the last word, and some between."""
    last = tensor.numel() // WORD - 1
    return torch.tensor([last * point // (_GLANCE_POINTS - 1) for point in range(_GLANCE_POINTS)]), WORD


def _places(tensor: Tensor, step: int) -> tuple[Tensor, int]:
    """Numbers of words, so that each row and each block of columns in every `step`th stretch is met; and their length.

    The blocks are taken in an order in which neighbouring rows have distant ones.
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
    """(rows, columns): the split of the shape that needs the fewest words; a long vector in rows of 1024."""
    if tensor.ndim == 1:
        return tensor.numel() // 1024, 1024
    splits = [(math.prod(tensor.shape[:k]), math.prod(tensor.shape[k:])) for k in range(1, tensor.ndim)]
    return min(splits, key=lambda split: max(split[0], split[1] // WORD))


def _stride(blocks: int) -> int:
    """About the golden part of `blocks` and without a common factor: so many steps meet every block once."""
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
    """With one copy to the CPU for each device."""
    devices = dict.fromkeys(sample.device for sample in samples)
    here = {device: torch.cat([s for s in samples if s.device == device]).cpu().numpy() for device in devices}
    begins = dict.fromkeys(devices, 0)
    for head, sample in zip(heads, samples, strict=True):
        begin = begins[sample.device]
        begins[sample.device] = end = begin + len(sample)
        yield hashlib.sha256(head.encode() + here[sample.device][begin:end].tobytes()).digest()
