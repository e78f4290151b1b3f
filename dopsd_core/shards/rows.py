"""The rows of one shard: what its tensors are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..training.set_facts import MostTokens

ROWS_FORMAT = "dopsd-shard-1"


@dataclass(frozen=True)
class StoredCondition:
    """A condition by the names of its tensors.

    Attributes:
        features: name of its features.
        references: names of its reference latents.
        slots: as of `Condition`.
    """

    features: str
    references: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredPair:
    """A pair by the names of its tensors.

    Attributes:
        key: as of `DualCondition`.
        caption: as of `DualCondition`.
        shape: shape of the latent.
        student: its condition.
        teacher: its condition.
        latent: name of the target latent.
    """

    key: str
    caption: str
    shape: tuple[int, ...]
    student: StoredCondition
    teacher: StoredCondition
    latent: str


@dataclass(frozen=True)
class StoredExample:
    """An image as the trainer samples it: indices into the pairs of its shard, from `first` on.

    Attributes:
        first: the first of its pairs.
        shape: shape of the latents.
        variants: as of `Example`, from `first` on.
        dropped: as of `Example`, from `first` on.
        repeats: visits per epoch.
    """

    first: int
    shape: tuple[int, ...]
    variants: tuple[int, ...]
    dropped: int | None
    repeats: int


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard.

    Attributes:
        encoding: digest of how it was encoded.
        stamp: of the images and captions; another one means that they were changed.
        is_last: whether it is the last shard of its part.
        pairs: the pairs.
        examples: the images.
        anchors: captions without the concept's name, as `Anchor.key`, and their conditions.
        heldout: the held-out pair, in the first shard.
        most: the largest numbers of tokens; None without pairs.
        masked: number of images with a mask.
        size: of the file of the tensors in bytes.
        sums: CRC-32 of each tensor.
        images: digest of each image's pixels, to find duplicates.
        lost: number of images that were left out because of errors.
    """

    encoding: str
    stamp: str
    is_last: bool
    pairs: tuple[StoredPair, ...] = ()
    examples: tuple[StoredExample, ...] = ()
    anchors: tuple[tuple[str, StoredCondition], ...] = ()
    heldout: StoredPair | None = None
    most: MostTokens | None = None
    masked: int = 0
    size: int = 0
    sums: Mapping[str, int] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    lost: int = 0

    def to_json(self) -> bytes:
        """The rows as JSON."""
        return json.dumps({"format": ROWS_FORMAT, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ShardRows:
        """The rows of a file.

        Raises:
            ValueError: it is torn, or of another format.
        """
        try:
            row = json.loads(data)
            if row.pop("format") != ROWS_FORMAT:
                raise ValueError("another format")
            return cls(**{**row, **_values(row)})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"these are no rows of a shard ({error})") from error


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    most = row["most"]
    return {
        "pairs": tuple(map(_pair, row["pairs"])),
        "examples": tuple(_example(value) for value in row["examples"]),
        "anchors": tuple((text, _condition(value)) for text, value in row["anchors"]),
        "heldout": _pair(row["heldout"]) if row["heldout"] else None,
        "most": MostTokens(tuple(most["student"]), tuple(most["teacher"])) if most else None,
        "images": tuple(row["images"]),
    }


def _pair(value: Mapping[str, Any]) -> StoredPair:
    changed = {name: _condition(value[name]) for name in ("student", "teacher")}
    return StoredPair(**{**value, **changed, "shape": tuple(value["shape"])})


def _condition(value: Mapping[str, Any]) -> StoredCondition:
    return StoredCondition(value["features"], tuple(value["references"]), tuple(value["slots"]))


def _example(value: Mapping[str, Any]) -> StoredExample:
    shape: Sequence[int] = value["shape"]
    return StoredExample(**{**value, "shape": tuple(shape), "variants": tuple(value["variants"])})
