"""A training set on disk: pairs and anchors are read when they are drawn."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..conditioning.encode import Condition, DualCondition
from ..data.encoding_plan import Example
from ..families import Family
from ..lazy_sequence import Column, Lazy
from ..objectives import ClassImage
from ..training.anchors import stripped_repeats
from ..training.set_facts import MostTokens
from ..training.training_set import TrainingSet
from .index import Kind
from .reader import Shards


@dataclass(frozen=True, eq=False)
class StreamedSet(TrainingSet):
    """The same training set as the dataset itself gives, in memory that does not grow with its conditions.

    Attributes:
        shards: the encoded dataset.
        kinds: the kind of each example.
        repeated: factor of the visits per epoch.
        prompts: those of the anchors that are not of the dataset.
    """

    shards: Shards | None = None
    kinds: Sequence[Kind] = ()
    repeated: int = 1
    prompts: Sequence[Condition] = ()

    def __post_init__(self) -> None:
        """Checks nothing: `encode` wrote only what fits."""

    @property
    def _shards(self) -> Shards:
        assert self.shards is not None
        return self.shards

    def shapes(self) -> Column[tuple[int, ...]]:
        """The latent shape of each example."""
        return Column(kind.shape for kind in self.kinds)

    def repeats(self) -> Column[int]:
        """Visits per epoch of each example."""
        return Column(kind.repeats * self.repeated for kind in self.kinds)

    def sample(self) -> Sequence[DualCondition]:
        """The first pair: a dataset has images or edits, not both."""
        return [self.pairs[0]]

    def most_tokens(self, family: Family) -> MostTokens:
        """The largest numbers of tokens of a forward."""
        most = self._shards.index.most
        prompts = max((len(condition.features) for condition in self.prompts), default=0)
        return most.or_more(MostTokens((0, prompts), (0, 0)))

    def _described(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        return self._shards.described()


def stream(
    shards: Shards,
    *,
    repeats: int = 1,
    anchors: bool = False,
    prompts: Sequence[Condition] = (),
    regularisation: Sequence[ClassImage] = (),
) -> StreamedSet:
    """The training set of an encoded dataset.

    Args:
        shards: the encoded dataset.
        repeats: factor of the visits per epoch.
        anchors: whether captions without the concept's name are prior anchors.
        prompts: conditions [L, D] of further anchors.
        regularisation: ordinary images.
    """
    index = shards.index
    kinds = Column(index.kinds[number] for shard in index.shards for number in shard.examples)
    firsts = array("q", [0, *accumulate(kind.pairs for kind in kinds)])

    def example(number: int) -> Example:
        kind, first = kinds[number], firsts[number]
        dropped = None if kind.dropped is None else first + kind.dropped
        return Example(tuple(first + variant for variant in kind.variants), dropped, kind.repeats * repeats)

    return StreamedSet(
        pairs=Lazy(shards.num_pairs, shards.pair),
        anchors=_anchors(shards, prompts) if anchors else (),
        heldout=shards.heldout(),
        examples=Lazy(len(kinds), example),
        regularisation=regularisation,
        shards=shards,
        kinds=kinds,
        repeated=repeats,
        prompts=prompts if anchors else (),
    )


def _anchors(shards: Shards, prompts: Sequence[Condition]) -> Lazy[Condition]:
    """Each caption of the dataset as often as in memory, then the prompts."""
    count = shards.num_anchors
    stored = count * stripped_repeats(count, len(prompts))
    return Lazy(stored + len(prompts), lambda n: shards.anchor(n % count) if n < stored else prompts[n - stored])
