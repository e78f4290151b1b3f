"""Reads shards: any pair by its index, with a few files open at a time."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..conditioning.encode import Condition, DualCondition
from ..text import printable
from .index import AGAIN, Index, digest_of_rows, rows_file, tensors_file
from .rows import ShardRows, StoredCondition, StoredPair
from .writer import checksum

OPEN = 4
"""Number of shards that are open at the same time; their files are mapped, not read."""


class ShardError(ValueError):
    """Raised if a shard is missing or damaged; the message says what to do."""


@dataclass(frozen=True, eq=False)
class _Open:
    """An open shard: its rows, and the reader of its tensors."""

    rows: ShardRows
    tensors: Any


class Shards:
    """The pairs and anchors of a complete encoded dataset.

    Raises:
        ShardError: files are missing or have another size.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self._pair_ends = array("q", accumulate(shard.pairs for shard in index.shards))
        self._anchor_ends = array("q", accumulate(len(shard.anchors) for shard in index.shards))
        self._open: OrderedDict[int, _Open] = OrderedDict()
        for shard in index.shards:
            self._check_size(shard.name, shard.size)

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return self._pair_ends[-1]

    @property
    def num_anchors(self) -> int:
        """Number of captions without the concept's name."""
        return self._anchor_ends[-1]

    def pair(self, number: int) -> DualCondition:
        """Pair `number`, read from its shard: features [L, D], latent [C, h, w].

        Raises:
            ShardError: the shard was removed, replaced or damaged.
        """
        shard, place = _located(self._pair_ends, number)
        return self._pair(shard, self._opened(shard).rows.pairs[place])

    def heldout(self) -> DualCondition | None:
        """The held-out pair, features [L, D] and latent [C, h, w]; raises ShardError."""
        stored = self._opened(0).rows.heldout if self.index.has_heldout else None
        return self._pair(0, stored) if stored is not None else None

    def anchor(self, number: int) -> Condition:
        """The condition [L, D] of caption `number` without the concept's name; raises ShardError."""
        shard, place = _located(self._anchor_ends, number)
        entry = self.index.shards[shard]
        return self._condition(shard, self._opened(shard).rows.anchors[entry.anchors[place]][1])

    def described(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(key, caption, latent shape) of every pair, from the rows alone; raises ShardError."""
        for shard in range(len(self.index.shards)):
            yield from ((pair.key, pair.caption, pair.shape) for pair in self._rows(shard).pairs)

    def captions(self, count: int) -> list[str]:
        """The first captions, without repetitions."""
        found: dict[str, None] = {}
        for number in range(self.num_pairs):
            shard, place = _located(self._pair_ends, number)
            if caption := self._opened(shard).rows.pairs[place].caption:
                found[caption] = None
            if len(found) == count:
                break
        return list(found)

    # -- files --------------------------------------------------------------------------------------------------------

    def _pair(self, shard: int, stored: StoredPair) -> DualCondition:
        student, teacher = self._condition(shard, stored.student), self._condition(shard, stored.teacher)
        return DualCondition(student, teacher, self._tensor(shard, stored.latent), stored.caption, stored.key)

    def _condition(self, shard: int, stored: StoredCondition) -> Condition:
        references = tuple(self._tensor(shard, name) for name in stored.references)
        return Condition(self._tensor(shard, stored.features), references, stored.slots)

    def _tensor(self, shard: int, name: str) -> Tensor:
        opened = self._opened(shard)
        try:
            tensor = opened.tensors.get_tensor(name).clone()  # not a view of the mapped file
        except (SafetensorError, OSError) as error:
            raise self._damaged(shard, str(error)) from error
        if checksum(tensor) != opened.rows.sums.get(name):
            raise self._damaged(shard, f"the checksum of its tensor {name} differs")
        return tensor

    def _opened(self, shard: int) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        rows, entry = self._rows(shard), self.index.shards[shard]
        try:
            tensors: Any = safe_open(tensors_file(self.folder, entry.name), framework="pt", device="cpu")
            metadata = tensors.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._damaged(shard, str(error)) from error
        if (metadata.get("encoding"), metadata.get("stamp")) != (rows.encoding, rows.stamp):
            raise self._damaged(shard, "it belongs to another encoding")
        self._open[shard] = _Open(rows, tensors)
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return self._open[shard]

    def _rows(self, shard: int) -> ShardRows:
        entry = self.index.shards[shard]
        try:
            data = rows_file(self.folder, entry.name).read_bytes()
        except OSError as error:
            raise ShardError(printable(f"{error.filename} is missing: {AGAIN}")) from error
        if digest_of_rows(data) != entry.rows:
            raise ShardError(printable(f"{rows_file(self.folder, entry.name)} is not the one of the index: {AGAIN}"))
        return ShardRows.from_json(data)

    def _check_size(self, name: str, size: int) -> None:
        file = tensors_file(self.folder, name)
        try:
            found = file.stat().st_size
        except OSError as error:
            raise ShardError(printable(f"{file} is missing: {AGAIN}, or copy it")) from error
        if found != size:
            raise ShardError(printable(f"{file} has {found} bytes in place of {size}: {AGAIN}, or copy it"))

    def _damaged(self, shard: int, why: str) -> ShardError:
        file = tensors_file(self.folder, self.index.shards[shard].name)
        return ShardError(printable(f"{file} is damaged ({why}): remove it and {AGAIN}"))


def _located(ends: array[int], number: int) -> tuple[int, int]:
    """(shard, index in it) of item `number`; ends: cumulative numbers of items."""
    shard = bisect_right(ends, number)
    return shard, number - (ends[shard - 1] if shard else 0)
