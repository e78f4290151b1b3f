"""Chooses gradient checkpointing: on which blocks, and which of their products each keeps.

Only the FIRST blocks are checkpointed: the backward reaches them last, when the activations of the others are freed, so
the recomputed activations need no additional memory. Each keeps those outputs of its Linears and of its attention that
save the most FLOPs per byte, as far as memory allows (`kept_products.py`). With activation offloading the next ones
wait in RAM, as far as that allows, and so do inputs of blocks if not even they fit (`activation_offloading.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

INPUT = "input"
"""A block's input among the names of what waits in RAM."""

WINDOW = 2**28
"""Bytes on the device that travel to RAM or back at most, unless a single tensor is larger: 10 ms of PCIe 4.0 x16."""


@dataclass(frozen=True)
class Product:
    """The output of a frozen Linear or of attention.

    Attributes:
        name: of the Linear (`LinearSite.name`), or `kept_products.ATTENTION`.
        size: bytes, if it is kept.
        flops: FLOPs, if it is computed again; a multiply-add is two.
    """

    name: str
    size: int
    flops: float


@dataclass(frozen=True)
class BlockBytes:
    """Activation memory of a block in bytes.

    Attributes:
        kept: saved for its backward without gradient checkpointing.
        entry: saved if it is checkpointed.
        products: what it may keep besides if it is checkpointed; none if its Linears are trained themselves.
        others: FLOPs of what is always computed again if it is checkpointed: the LoRA's products.
    """

    kept: int
    entry: int
    products: tuple[Product, ...] = ()
    others: float = 0.0

    def saved(self, names: Iterable[str], in_ram: Collection[str] = ()) -> int:
        """Bytes on the device if it is checkpointed and keeps these products.

        in_ram: the names of those of them, or `INPUT`, that are in RAM.
        """
        there = sum(product.size for product in self.products if product.name in names and product.name not in in_ram)
        return there + (0 if INPUT in in_ram else self.entry)

    def sizes(self, names: Collection[str]) -> list[int]:
        """Bytes of each of these products and, for `INPUT`, of the input."""
        inputs = [self.entry] if INPUT in names else []
        return [*inputs, *(product.size for product in self.products if product.name in names)]

    def repeated(self, names: Iterable[str]) -> float:
        """FLOPs of its recomputation if it keeps these products."""
        return self.others + sum(product.flops for product in self.products if product.name not in names)


@dataclass(frozen=True)
class Checkpointing:
    """The blocks with gradient checkpointing.

    Attributes:
        kept: the names of the products that each keeps, for the first blocks of the network in order; the others are
            not checkpointed.
        in_ram: those of them, or `INPUT`, that each has in RAM until its backward; empty if no block has any.
    """

    kept: tuple[frozenset[str], ...] = ()
    in_ram: tuple[frozenset[str], ...] = ()

    @classmethod
    def full(cls, count: int) -> Checkpointing:
        """On the first `count` blocks, which keep their inputs alone."""
        return cls((frozenset(),) * max(count, 0))

    @classmethod
    def keeping(cls, count: int, names: Iterable[str]) -> Checkpointing:
        """On the first `count` blocks, each of which keeps those of these products that are its own."""
        return cls((frozenset(names),) * max(count, 0))

    @classmethod
    def selective(cls, blocks: Sequence[BlockBytes]) -> Checkpointing:
        """On all blocks, which keep all of their products."""
        return cls(tuple(frozenset(product.name for product in block.products) for block in blocks))

    @classmethod
    def offloaded(cls, blocks: Sequence[BlockBytes]) -> Checkpointing:
        """On all blocks, which have all of their products and their inputs in RAM."""
        kept = cls.selective(blocks).kept
        return cls(kept, tuple(names | {INPUT} for names in kept))

    @classmethod
    def of(cls, given: Checkpointing | int) -> Checkpointing:
        """A number is that of fully checkpointed blocks."""
        return cls.full(given) if isinstance(given, int) else given

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self.kept)

    @property
    def placed(self) -> list[tuple[frozenset[str], frozenset[str]]]:
        """(what it keeps, what of it is in RAM) of each of them."""
        return list(zip(self.kept, self.in_ram or (frozenset(),) * self.count, strict=True))

    def ram_bytes(self, blocks: Sequence[BlockBytes]) -> int:
        """Bytes of activations in RAM."""
        return sum(self._ram_sizes(blocks))

    def in_flight(self, blocks: Sequence[BlockBytes]) -> int:
        """Bytes on the device that are on their way to RAM or back, at most."""
        sizes = self._ram_sizes(blocks)
        return min(sum(sizes), max([WINDOW, *sizes]))

    def _ram_sizes(self, blocks: Sequence[BlockBytes]) -> list[int]:
        return [size for block, names in zip(blocks, self.in_ram, strict=False) for size in block.sizes(names)]

    def flops(self, blocks: Sequence[BlockBytes]) -> float:
        """FLOPs of the recomputation in one backward."""
        return sum(block.repeated(names) for block, names in zip(blocks, self.kept, strict=False))

    def share_kept(self, blocks: Sequence[BlockBytes]) -> float:
        """The share of the checkpointed blocks' FLOPs that is kept, 0 to 1."""
        most = Checkpointing.full(self.count).flops(blocks)
        return 1 - self.flops(blocks) / most if most else 0.0


def peak_bytes(
    blocks: Sequence[BlockBytes], checkpointing: Checkpointing | int, forward: int = 0, backward: int = 0
) -> int:
    """Peak activation memory of the blocks.

    The peak is either between forward and backward, during the teacher's forward: what the checkpointed blocks keep and
    all activations of the others. Or during the recomputation and backward of a checkpointed block: what those up to it
    keep, and its activations, in which what it kept is used up. What is in RAM is on the device on its way alone.

    forward, backward: transient workspace per block in bytes.
    """
    chosen = Checkpointing.of(checkpointing)
    placed = chosen.placed
    saved = list(accumulate((block.saved(*where) for block, where in zip(blocks, placed, strict=False)), initial=0))
    between = saved[-1] + sum(block.kept for block in blocks[len(placed) :]) + max(forward, backward)
    repeated = (
        before + block.entry + max(block.kept, block.saved(names) - block.entry) + backward
        for before, block, (names, _) in zip(saved, blocks, placed, strict=False)
    )
    return max([between, *repeated]) + chosen.in_flight(blocks)


def plan_checkpointing(
    blocks: Sequence[BlockBytes], budget: int, forward: int = 0, backward: int = 0, ram: int = 0
) -> Checkpointing:
    """The checkpointing with the fewest FLOPs of recomputation whose `peak_bytes` are within the budget.

    All blocks, fully checkpointed, if even that is too much. ram: bytes of RAM that activations may take.
    """

    def peak(checkpointing: Checkpointing) -> int:
        return peak_bytes(blocks, checkpointing, forward, backward)

    alone = _on_device(blocks, lambda chosen: peak(chosen) <= budget)
    if not ram:
        return alone
    in_flight = max([WINDOW, *(product.size for block in blocks for product in block.products)])
    beside = _on_device(blocks, lambda chosen: peak(chosen) <= budget - in_flight)
    for number in range(beside.count):
        if peak(beside) - beside.in_flight(blocks) + in_flight <= budget or beside.ram_bytes(blocks) >= ram:
            break
        beside = _with(beside, [(number, INPUT)])
    beside = _filled(blocks, beside, ram)
    if peak(alone) <= budget:
        return beside if peak(beside) <= budget and beside.flops(blocks) < alone.flops(blocks) else alone
    return beside if peak(beside) < peak(alone) else alone


def _on_device(blocks: Sequence[BlockBytes], fits: Callable[[Checkpointing], bool]) -> Checkpointing:
    """The one with the fewest FLOPs that fits; all blocks, fully checkpointed, if none does."""
    best: Checkpointing | None = None
    for count in range(len(blocks) + 1):
        if not fits(Checkpointing.full(count)):
            continue
        order = _by_worth(blocks[:count])
        low, high = 0, len(order)
        while low < high:  # the largest number of products that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(_keeping(count, order[:middle])) else (low, middle - 1)
        found = _keeping(count, order[:low])
        if best is None or found.flops(blocks) < best.flops(blocks):
            best = found
        if not found.flops(blocks):
            break
    return best or Checkpointing.full(len(blocks))


def _filled(blocks: Sequence[BlockBytes], checkpointing: Checkpointing, ram: int) -> Checkpointing:
    """The same with the next products by FLOPs per byte in RAM, those that are equal spread over the blocks, so that
    the bytes in flight are spread over the forward."""
    left = ram - checkpointing.ram_bytes(blocks)
    waiting = [
        (-product.flops / max(product.size, 1), place, number, product)
        for number, (block, names) in enumerate(zip(blocks, checkpointing.kept, strict=False))
        for place, product in enumerate(block.products)
        if product.name not in names
    ]
    chosen = []
    for _, _, number, product in sorted(waiting, key=lambda one: one[:3]):
        if product.size <= left:
            left -= product.size
            chosen.append((number, product.name))
    return _with(checkpointing, chosen)


def _with(checkpointing: Checkpointing, in_ram: Iterable[tuple[int, str]]) -> Checkpointing:
    """The same with these products, (block, name), kept in RAM, or the inputs of blocks in RAM."""
    kept = [set(names) for names in checkpointing.kept]
    placed = [set(names) for _, names in checkpointing.placed]
    for number, name in in_ram:
        placed[number].add(name)
        if name != INPUT:
            kept[number].add(name)
    is_any = any(placed)
    return Checkpointing(tuple(map(frozenset, kept)), tuple(map(frozenset, placed)) if is_any else ())


def _by_worth(blocks: Sequence[BlockBytes]) -> list[tuple[int, str]]:
    """(block, product) by FLOPs per byte, those of later blocks first among equals, as they are freed earlier."""
    found = [
        (-product.flops / max(product.size, 1), -number, product.name)
        for number, block in enumerate(blocks)
        for product in block.products
    ]
    return [(-number, name) for _, number, name in sorted(found)]


def _keeping(count: int, chosen: Iterable[tuple[int, str]]) -> Checkpointing:
    kept: list[set[str]] = [set() for _ in range(count)]
    for number, name in chosen:
        kept[number].add(name)
    return Checkpointing(tuple(map(frozenset, kept)))
