"""Writes shards. The file of the rows comes last, so a shard with one is whole."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save as format_safetensors
from torch import Tensor

from ..conditioning.encode import Condition, DualCondition
from ..data.encoding_plan import Example
from ..families import Family
from ..files.atomic import write_atomic
from ..training.anchors import anchor_tokens
from ..training.set_facts import MostTokens, most_of
from ..training.training_set import latent_shape
from .index import rows_file, tensors_file
from .rows import ShardRows, StoredCondition, StoredExample, StoredPair


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """The contents of a shard.

    Attributes:
        pairs: the pairs, with latents [C, h, w] and features [L, D]; those of an example are adjacent.
        examples: the images, with indices into the pairs.
        anchors: captions without the concept's name, as `Anchor.key`, and their conditions.
        heldout: the held-out pair.
    """

    pairs: Sequence[DualCondition] = ()
    examples: Sequence[Example] = ()
    anchors: Sequence[tuple[str, Condition]] = ()
    heldout: DualCondition | None = None


def write_shard(folder: Path, name: str, images: EncodedImages, family: Family, facts: ShardRows) -> ShardRows:
    """Writes a shard atomically and returns its rows.

    facts: the rows without what follows from the images.

    Raises:
        DiskError: it could not be written; what is left is no whole shard.
    """
    tensors = _Tensors()
    rows = replace(
        facts,
        pairs=tuple(tensors.pair(pair) for pair in images.pairs),
        examples=tuple(_stored(example, images.pairs) for example in images.examples),
        anchors=tuple((text, tensors.condition(condition)) for text, condition in images.anchors),
        heldout=tensors.pair(images.heldout) if images.heldout is not None else None,
        most=_most_tokens(images, family),
    )
    rows_file(folder, name).unlink(missing_ok=True)
    data = format_safetensors(tensors.named, {"encoding": facts.encoding, "stamp": facts.stamp})
    write_atomic(tensors_file(folder, name), data)
    rows = replace(rows, size=len(data), sums={key: checksum(value) for key, value in tensors.named.items()})
    write_atomic(rows_file(folder, name), rows.to_json())
    return rows


def read_rows(folder: Path, name: str) -> tuple[bytes, ShardRows] | None:
    """(the file, the rows) of a whole shard; None if it is missing, torn, or its tensors have another size."""
    try:
        data = rows_file(folder, name).read_bytes()
        rows = ShardRows.from_json(data)
        return (data, rows) if tensors_file(folder, name).stat().st_size == rows.size else None
    except (OSError, ValueError):
        return None


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor of any shape."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _stored(example: Example, pairs: Sequence[DualCondition]) -> StoredExample:
    used = {*example.variants, *(() if example.dropped is None else (example.dropped,))}
    first = min(used)
    variants = tuple(index - first for index in example.variants)
    dropped = None if example.dropped is None else example.dropped - first
    return StoredExample(first, latent_shape(pairs[first]), variants, dropped, example.repeats)


def _most_tokens(images: EncodedImages, family: Family) -> MostTokens | None:
    if not images.pairs:
        return None
    students = [family.tokens(latent_shape(pair), pair.student) for pair in images.pairs]
    shapes = [latent_shape(pair) for pair in images.pairs]
    students += anchor_tokens(family, [condition for _, condition in images.anchors], shapes)
    return MostTokens(
        most_of(students), most_of([family.tokens(latent_shape(pair), pair.teacher) for pair in images.pairs])
    )


@dataclass
class _Tensors:
    """Names tensors; one that several pairs share is stored once."""

    named: dict[str, Tensor] = field(default_factory=dict)
    known: dict[int, tuple[Tensor, str]] = field(default_factory=dict)  # by id, with the tensor that keeps it

    def pair(self, pair: DualCondition) -> StoredPair:
        shape = latent_shape(pair)
        assert pair.target_latent is not None
        student, teacher = self.condition(pair.student), self.condition(pair.teacher)
        return StoredPair(pair.key, pair.caption, shape, student, teacher, self._name(pair.target_latent))

    def condition(self, condition: Condition) -> StoredCondition:
        references = tuple(self._name(latent) for latent in condition.reference_latents)
        return StoredCondition(self._name(condition.features), references, condition.slots)

    def _name(self, tensor: Tensor) -> str:
        if id(tensor) not in self.known:
            name = str(len(self.named))
            self.known[id(tensor)] = tensor, name
            self.named[name] = tensor.contiguous()
        return self.known[id(tensor)][1]
