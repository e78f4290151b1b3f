"""Chooses gradient checkpointing: on which blocks, and which of their products each keeps.

Only the FIRST blocks are checkpointed: the backward reaches them last, when the activations of the others are freed, so
the recomputed activations need no additional memory. Each keeps those outputs of its Linears and of its attention that
save the most FLOPs per byte, as far as memory allows (`kept_products.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


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

    def saved(self, names: Iterable[str]) -> int:
        """Bytes if it is checkpointed and keeps these products."""
        return self.entry + sum(product.size for product in self.products if product.name in names)

    def repeated(self, names: Iterable[str]) -> float:
        """FLOPs of its recomputation if it keeps these products."""
        return self.others + sum(product.flops for product in self.products if product.name not in names)


@dataclass(frozen=True)
class Checkpointing:
    """The blocks with gradient checkpointing.

    Attributes:
        kept: the names of the products that each keeps, for the first blocks of the network in order; the others are
            not checkpointed.
    """

    kept: tuple[frozenset[str], ...] = ()

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
    def of(cls, given: Checkpointing | int) -> Checkpointing:
        """A number is that of fully checkpointed blocks."""
        return cls.full(given) if isinstance(given, int) else given

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self.kept)

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
    keep, and its activations, in which what it kept is used up. forward, backward: transient workspace per block in
    bytes.
    """
    kept = Checkpointing.of(checkpointing).kept
    saved = list(accumulate((block.saved(names) for block, names in zip(blocks, kept, strict=False)), initial=0))
    between = saved[-1] + sum(block.kept for block in blocks[len(kept) :]) + max(forward, backward)
    repeated = (
        before + block.entry + max(block.kept, block.saved(names) - block.entry) + backward
        for before, block, names in zip(saved, blocks, kept, strict=False)
    )
    return max([between, *repeated])


def plan_checkpointing(blocks: Sequence[BlockBytes], budget: int, forward: int = 0, backward: int = 0) -> Checkpointing:
    """The checkpointing with the fewest FLOPs of recomputation whose `peak_bytes` are within the budget.

    All blocks, fully checkpointed, if even that is too much.
    """

    def fits(checkpointing: Checkpointing) -> bool:
        return peak_bytes(blocks, checkpointing, forward, backward) <= budget

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
