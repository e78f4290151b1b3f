"""The order of batches with several resolutions: which one a batch has, and which batch of it that is.

Both are functions of (seed, number of the batch). In every block of `BLOCK` batches each resolution has its share, in
an order drawn from the seed. At the start of a run, larger resolutions may be left out: of n resolutions, the i-th
smallest joins after (i - 1) / (n - 1) of `small_first` batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .rng import DataOrder, derive_seed

BLOCK = 20


@dataclass(frozen=True)
class ScaleShare:
    """The examples of one resolution.

    Attributes:
        share: of the batches, in proportion to the others'.
        first: index of the first example.
        end: index behind the last one.
        pixels: size by which resolutions are ordered.
    """

    share: float
    first: int
    end: int
    pixels: int


@dataclass(frozen=True)
class ScaledOrder:
    """An endless sequence of batches, each of one resolution and one shape.

    Attributes:
        order: the examples of all resolutions.
        scales: the resolutions.
        small_first: batches from the start before the largest resolution joins; 0 for all from the start.
    """

    order: DataOrder
    scales: tuple[ScaleShare, ...]
    small_first: int = 0

    def batch(self, number: int) -> tuple[int, ...]:
        """The example indices of batch `number` (from 0) of the run."""
        index, turn = self.scale_of(number)
        scale = self.scales[index]
        return tuple(scale.first + example for example in _part(self.order, scale.first, scale.end).batch(turn))

    def scale_of(self, number: int) -> tuple[int, int]:
        """(index of the batch's resolution, the number of earlier batches with it)."""
        counts = [0] * len(self.scales)
        begin = 0
        for end, members in self._stages():
            is_here = end is None or number < end
            done = number - begin if is_here or end is None else end - begin
            for place, index in enumerate(members):
                counts[index] += _count(self, members, begin, done, place)
            if is_here or end is None:
                chosen = members[_drawn(self, members, begin, done)]
                return chosen, counts[chosen]
            begin = end
        raise AssertionError("the last stage has no end")

    def _stages(self) -> list[tuple[int | None, tuple[int, ...]]]:
        """(end, resolutions) of each stage; the last one, with all resolutions, does not end."""
        by_size = sorted(range(len(self.scales)), key=lambda index: self.scales[index].pixels)
        joins = [self.small_first * place // max(len(by_size) - 1, 1) for place in range(len(by_size))]
        stages: list[tuple[int | None, tuple[int, ...]]] = []
        for place in range(1, len(by_size)):
            if joins[place] > joins[place - 1]:
                stages.append((joins[place], tuple(by_size[:place])))
        return [*stages, (None, tuple(by_size))]


@lru_cache(maxsize=16)
def _part(order: DataOrder, first: int, end: int) -> DataOrder:
    """The order of some of the examples; its draws are of its own."""
    seed = order.seed if first == 0 else derive_seed(order.seed, "scale", first)
    return DataOrder(order.shapes[first:end], order.repeats[first:end], order.batch_size, seed)


def _drawn(order: ScaledOrder, members: tuple[int, ...], begin: int, done: int) -> int:
    """Which of the members the batch `done` of a stage has, as an index into them."""
    block, place = divmod(done, BLOCK)
    return _block(order, members, begin, block)[place]


def _count(order: ScaledOrder, members: tuple[int, ...], begin: int, done: int, member: int) -> int:
    """How many of the first `done` batches of a stage a member has."""
    blocks, rest = divmod(done, BLOCK)
    each = _quotas(tuple(order.scales[index].share for index in members))[member]
    return blocks * each + (_block(order, members, begin, blocks)[:rest].count(member) if rest else 0)


@lru_cache(maxsize=64)
def _block(order: ScaledOrder, members: tuple[int, ...], begin: int, block: int) -> tuple[int, ...]:
    """The members of a block's batches, in the order drawn."""
    quotas = _quotas(tuple(order.scales[index].share for index in members))
    batches = [member for member, quota in enumerate(quotas) for _ in range(quota)]
    keys = [derive_seed(order.order.seed, "scales", begin, block, place) for place in range(BLOCK)]
    return tuple(batches[place] for place in sorted(range(BLOCK), key=lambda place: keys[place]))


@lru_cache(maxsize=16)
def _quotas(shares: tuple[float, ...]) -> tuple[int, ...]:
    """Batches of a block for each share, at least one each: the largest remainders round up."""
    total = sum(shares)
    exact = [share / total * BLOCK for share in shares]
    quotas = [max(1, int(value)) for value in exact]
    while sum(quotas) != BLOCK:
        if sum(quotas) < BLOCK:
            place = max(range(len(quotas)), key=lambda i: exact[i] - quotas[i])
            quotas[place] += 1
        else:
            place = max(range(len(quotas)), key=lambda i: (quotas[i] > 1, quotas[i] - exact[i]))
            quotas[place] -= 1
    return tuple(quotas)


def ordered(order: DataOrder, scales: tuple[ScaleShare, ...], small_first: int) -> DataOrder | ScaledOrder:
    """The order of a run's batches. small_first: in batches."""
    return ScaledOrder(order, scales, small_first) if scales else order
