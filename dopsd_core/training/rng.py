"""All randomness of a run is a function of (seed, step, micro), so that a resumed run samples the same values.

Nothing here has state, and training never uses a global random generator. `step` counts optimizer steps from 0,
`micro` the batches accumulated in one.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..data.encoding_plan import Example


def derive_seed(seed: int, *parts: object) -> int:
    """A seed in 0..2^63-1 for one purpose, from the run's seed and the parts that name the purpose."""
    return _to_seed(_digest(seed, *parts).digest())


def _digest(seed: int, *parts: object) -> hashlib._Hash:
    return hashlib.sha256("/".join(str(part) for part in ("dopsd", seed, *parts)).encode())


def _to_seed(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed: int, *parts: object) -> torch.Generator:
    """A CPU generator for one purpose; CPU generators are the same on every machine."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def draw_noise(seed: int, step: int, first: int, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Standard normal noise [B, C, h, w] fp32 on the CPU for the samples `first`, `first` + 1, ... of a step.

    Noise is seeded per sample: four accumulated batches of one get the same noise as one batch of four.
    """
    samples = [
        torch.randn(shape, generator=make_generator(seed, "noise", step, first + offset))
        for offset, shape in enumerate(shapes)
    ]
    return torch.stack(samples)


def draw_variant(example: Example, dropout: float, seed: int, step: int, sample: int) -> int:
    """Samples the condition of an example: the empty caption with probability `dropout`, else one of its variants."""
    if example.dropped is not None and derive_seed(seed, "dropout", step, sample) < dropout * 2**63:
        return example.dropped
    return example.variants[derive_seed(seed, "caption", step, sample) % len(example.variants)]


@dataclass(frozen=True)
class DataOrder:
    """An endless sequence of batches: each epoch visits every example `repeats` times; a batch has a single shape.

    If a shape's examples do not fill its last batch of an epoch, the batch is filled from the beginning of the same
    order, so that no example is skipped.

    Attributes:
        shapes: the shape of each example; examples of different shapes never share a batch. Hashable, like `repeats`.
        repeats: visits per epoch of each example.
        batch_size: examples per batch.
        seed: the run's seed.
    """

    shapes: Sequence[Hashable]
    repeats: Sequence[int]
    batch_size: int
    seed: int

    def batch(self, number: int) -> tuple[int, ...]:
        """The `batch_size` example indices of batch `number` (from 0) of the run."""
        groups = _groups(self)
        epoch, position = divmod(number, groups[-1].end)
        visits = sum(group.visits for group in groups)
        place = _sorted_place if visits <= SORTED_VISITS else _scattered_place
        return place(self, groups, epoch, position)


SORTED_VISITS = 1 << 19
"""Up to this many visits, an epoch's order is sorted, in a second or two; beyond that, each position is computed
separately."""


@dataclass(frozen=True)
class _Group:
    """The examples of one shape; before shuffling, its batches are first..end of an epoch's.

    ends: cumulative number of visits; the visits of an example are adjacent.
    """

    number: int
    examples: Sequence[int]
    ends: Sequence[int]
    first: int
    batch_size: int

    @property
    def visits(self) -> int:
        return self.ends[-1]

    @property
    def end(self) -> int:
        return self.first + -(-self.visits // self.batch_size)

    def places(self, turn: int) -> list[int]:
        """The positions of batch `turn` in the group's order, modulo its length."""
        return [(turn * self.batch_size + offset) % self.visits for offset in range(self.batch_size)]

    def example(self, visit: int) -> int:
        return self.examples[bisect_right(self.ends, visit)]


@lru_cache(maxsize=4)
def _groups(order: DataOrder) -> tuple[_Group, ...]:
    """The groups in the order in which their shapes occur, without listing the visits."""
    members: dict[Hashable, array[int]] = {}  # arrays: there may be millions
    for index, shape in enumerate(order.shapes):
        members.setdefault(shape, array("q")).append(index)
    groups: list[_Group] = []
    for number, examples in enumerate(members.values()):
        ends = array("q", accumulate(order.repeats[index] for index in examples))
        groups.append(_Group(number, examples, ends, groups[-1].end if groups else 0, order.batch_size))
    return tuple(groups)


# -- sorted epochs -----------------------------------------------------------------------------------------------------


def _sorted_place(order: DataOrder, groups: Sequence[_Group], epoch: int, position: int) -> tuple[int, ...]:
    """Shuffles each group, splits it into batches and interleaves the groups at random."""
    shuffled, numbers, turns = _sorted_epoch(order, epoch)
    group = groups[int(numbers[position])]
    return tuple(int(shuffled[group.number][place]) for place in group.places(int(turns[position])))


@lru_cache(maxsize=4)
def _sorted_epoch(order: DataOrder, epoch: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(examples of each group [visits], group of each batch [batches], its index in the group [batches])."""
    groups = _groups(order)
    shuffled = []
    for group in groups:
        counts = [order.repeats[index] for index in group.examples]
        visits = ((index, visit) for index, count in zip(group.examples, counts, strict=True) for visit in range(count))
        by_place = torch.tensor(group.examples).repeat_interleave(torch.tensor(counts))
        shuffled.append(by_place[_sorting(visits, order.seed, "order", epoch, group.number)])
    batches = ((group.number, turn) for group in groups for turn in range(group.end - group.first))
    by_place = torch.cat([torch.full((group.end - group.first,), group.number) for group in groups])
    numbers = by_place[_sorting(batches, order.seed, "groups", epoch)]
    turns = torch.empty_like(numbers)
    for group in groups:
        mine = numbers == group.number
        turns[mine] = torch.arange(group.end - group.first)
    return tuple(shuffled), numbers, turns


def _sorting(items: Iterable[tuple[int, int]], seed: int, *parts: object) -> Tensor:
    """Indices that sort items by their hashes (`derive_seed` of parts and item), stably: the same on every machine and
    with every version of every library."""
    stem = _digest(seed, *parts)
    stem.update(b"/")
    keys = array("q")
    for item in items:
        digest = stem.copy()
        digest.update(str(item).encode())
        keys.append(_to_seed(digest.digest()))
    return torch.sort(torch.tensor(keys, dtype=torch.int64), stable=True).indices


# -- epochs too long to be sorted --------------------------------------------------------------------------------------


def _scattered_place(order: DataOrder, groups: Sequence[_Group], epoch: int, position: int) -> tuple[int, ...]:
    """Computes a position separately: permutes the batches of all groups, and the visits of each group."""
    batch = _scattered(position, groups[-1].end, order.seed, "batch", epoch)
    group = next(group for group in groups if batch < group.end)
    return tuple(
        group.example(_scattered(place, group.visits, order.seed, "visit", epoch, group.number))
        for place in group.places(batch - group.first)
    )


def _scattered(place: int, size: int, seed: int, *parts: object) -> int:
    """The image of `place` under a pseudorandom permutation of 0..size-1: a Feistel cipher with cycle walking."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (derive_seed(seed, *parts, turn, right) & mask)
        place = left << half | right
        if place < size:
            return place
