"""All chance of a run, as functions of (seed, step, micro): what is killed and resumed draws the same again.

Nothing here has state, and nothing in training reads a global random generator. `step` counts optimizer steps from 0,
`micro` the batches accumulated in one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..data.dataset import Example


def derive_seed(seed: int, *parts: object) -> int:
    """A seed in 0..2^63-1 for one purpose, from the run's seed and what names the purpose."""
    text = "/".join(str(part) for part in ("dopsd", seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(seed: int, *parts: object) -> torch.Generator:
    """A CPU generator for one purpose; the CPU's numbers are the same on every machine."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def draw_noise(seed: int, step: int, first: int, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Unit normal noise [B, C, h, w] fp32 on the CPU for the samples `first`, `first` + 1, ... of a step.

    By sample, not by batch: four accumulated batches of one get the noise of one batch of four.
    """
    samples = [
        torch.randn(shape, generator=make_generator(seed, "noise", step, first + offset))
        for offset, shape in enumerate(shapes)
    ]
    return torch.stack(samples)


def draw_variant(example: Example, dropout: float, seed: int, step: int, sample: int) -> int:
    """Which condition of an example a visit uses: the empty caption with chance `dropout`, else any of its variants."""
    if example.dropped is not None and derive_seed(seed, "dropout", step, sample) < dropout * 2**63:
        return example.dropped
    return example.variants[derive_seed(seed, "caption", step, sample) % len(example.variants)]


@dataclass(frozen=True)
class DataOrder:
    """Batches without end: each epoch visits every example `repeats` times, batches hold one shape.

    Where a shape's examples do not fill its last batch of an epoch, the batch is filled from the beginning of the
    same order, so that no example is left out.

    Attributes:
        shapes: what tells apart the examples that may not share a batch.
        repeats: visits per epoch of each example, in the same order.
    """

    shapes: tuple[Hashable, ...]
    repeats: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, number: int) -> tuple[int, ...]:
        """The `batch_size` example indices of the run's batch `number` (from 0)."""
        epoch, position = divmod(number, self._batches_per_epoch())
        return _epoch(self, epoch)[position]

    def _groups(self) -> dict[Hashable, list[tuple[int, int]]]:
        groups: dict[Hashable, list[tuple[int, int]]] = {}
        for index, (shape, repeats) in enumerate(zip(self.shapes, self.repeats, strict=True)):
            groups.setdefault(shape, []).extend((index, visit) for visit in range(repeats))
        return groups

    def _batches_per_epoch(self) -> int:
        return sum(-(-len(visits) // self.batch_size) for visits in self._groups().values())


@lru_cache(maxsize=4)
def _epoch(order: DataOrder, epoch: int) -> tuple[tuple[int, ...], ...]:
    """The batches of an epoch: each group shuffled and cut, then the groups mixed, each in its own order."""
    queues: list[list[tuple[int, ...]]] = []
    for number, visits in enumerate(order._groups().values()):
        shuffled = [index for index, _ in _shuffle(visits, order.seed, "order", epoch, number)]
        count = -(-len(shuffled) // order.batch_size)
        filled = [shuffled[i % len(shuffled)] for i in range(count * order.batch_size)]
        queues.append([tuple(filled[i : i + order.batch_size]) for i in range(0, len(filled), order.batch_size)])
    turns = [(number, turn) for number, queue in enumerate(queues) for turn in range(len(queue))]
    mixed = _shuffle(turns, order.seed, "groups", epoch)
    remaining = [iter(queue) for queue in queues]
    return tuple(next(remaining[number]) for number, _ in mixed)


def _shuffle(items: Sequence[tuple[int, int]], seed: int, *parts: object) -> list[tuple[int, int]]:
    """Items in the order of their hashes: the same on every machine, in every release of every library."""
    return sorted(items, key=lambda item: (derive_seed(seed, *parts, item), item))
