"""The index of an encoded dataset: its encoding, and once it is complete, its shards and examples in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomic
from ..text import printable
from ..training.set_facts import MostTokens
from .encoding import Encoding
from .rows import ShardRows

INDEX = "index.json"
INDEX_FORMAT = "dopsd-shards-1"

AGAIN = "run encode again, with the same command"


def shard_name(part: int, number: int) -> str:
    """The name of the files of a shard, without suffix."""
    return f"shard-{part:05d}-{number:05d}"


def rows_file(folder: Path, name: str) -> Path:
    """The file of a shard's rows."""
    return folder / f"{name}.json"


def tensors_file(folder: Path, name: str) -> Path:
    """The file of a shard's tensors."""
    return folder / f"{name}.safetensors"


@dataclass(frozen=True)
class Kind:
    """A kind of example: many have the same shape, number of captions and repeats.

    Attributes:
        shape: shape of the latent.
        variants: as of `Example`, from its first pair on.
        dropped: as of `Example`, from its first pair on.
        repeats: visits per epoch.
        pairs: number of its pairs.
    """

    shape: tuple[int, ...]
    variants: tuple[int, ...]
    dropped: int | None
    repeats: int
    pairs: int


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the index.

    Attributes:
        name: of its files, without suffix.
        rows: SHA-256 of the file of its rows.
        size: of the file of its tensors in bytes.
        pairs: number of its pairs.
        examples: the kind of each of its examples.
        anchors: which of its anchors are the first of their text in the dataset.
    """

    name: str
    rows: str
    size: int
    pairs: int
    examples: tuple[int, ...]
    anchors: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """The contents of `index.json`.

    Attributes:
        encoding: how the dataset was encoded.
        dataset: where it came from.
        is_complete: whether the rest is there.
        kinds: the kinds of examples.
        shards: the shards in order.
        most: the largest numbers of tokens.
        has_heldout: whether the first shard has a held-out pair.
    """

    encoding: Encoding
    dataset: str
    is_complete: bool = False
    kinds: tuple[Kind, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    most: MostTokens = MostTokens((0, 0), (0, 0))
    has_heldout: bool = False

    def write(self, folder: Path) -> None:
        """Writes it atomically; raises DiskError."""
        write_atomic(folder / INDEX, self._to_json())

    def digest(self) -> str:
        """A digest of encoding, shards and examples, in hex."""
        return digest_of_rows(self._to_json())

    def _to_json(self) -> bytes:
        return json.dumps({"format": INDEX_FORMAT, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder.

        Raises:
            ValueError: it is damaged, or of another format.
            OSError: it cannot be read.
        """
        file = folder / INDEX
        data = file.read_bytes()
        try:
            found = json.loads(data)
            if found.pop("format") != INDEX_FORMAT:
                raise ValueError("another format")
            return cls(**{**found, **_values(found)})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                printable(f"{file} is damaged, or of another version: remove it and {AGAIN} ({error})")
            ) from error

    def describe(self, folder: Path) -> str:
        """The dataset in a line."""
        images, pairs = sum(len(s.examples) for s in self.shards), sum(s.pairs for s in self.shards)
        size = sum(s.size for s in self.shards)
        return f"{folder}: {images} encoded images in {len(self.shards)} shards, {pairs} pairs, {size / 1e9:.3g} GB"


def _values(found: Mapping[str, Any]) -> dict[str, Any]:
    most = found["most"]
    return {
        "encoding": Encoding.from_facts(found["encoding"]),
        "kinds": tuple(Kind(**{**k, "shape": tuple(k["shape"]), "variants": tuple(k["variants"])})
                       for k in found["kinds"]),
        "shards": tuple(ShardEntry(**{**s, "examples": tuple(s["examples"]), "anchors": tuple(s["anchors"])})
                        for s in found["shards"]),
        "most": MostTokens(tuple(most["student"]), tuple(most["teacher"])),
    }  # fmt: skip


def is_encoded(folder: Path) -> bool:
    """Whether a folder is an encoded dataset, complete or not: it has an index of this format, or shards with any."""
    try:
        data = (folder / INDEX).read_bytes()
    except OSError:
        return any(folder.glob("shard-*-*.safetensors"))
    try:
        found = json.loads(data)
    except ValueError:
        return any(folder.glob("shard-*-*.*"))
    return isinstance(found, dict) and str(found.get("format", "")).startswith(INDEX_FORMAT.rpartition("-")[0])


def digest_of_rows(data: bytes) -> str:
    """SHA-256 of a file of rows, in hex."""
    return hashlib.sha256(data).hexdigest()


class IndexMaker:
    """Makes a complete index from the rows of the shards, one after another."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, int] = {}
        self._shards: list[ShardEntry] = []
        self._texts: set[str] = set()
        self._images: set[str] = set()
        self._most = MostTokens((0, 0), (0, 0))
        self._has_heldout = False
        self.masked = self.lost = self.twins = 0

    def add(self, name: str, data: bytes, rows: ShardRows) -> None:
        """Adds the next shard; `data` is the file of its rows."""
        ends = [example.first for example in rows.examples[1:]] + [len(rows.pairs)] * bool(rows.examples)
        kinds = [
            self._kinds.setdefault(Kind(e.shape, e.variants, e.dropped, e.repeats, end - e.first), len(self._kinds))
            for e, end in zip(rows.examples, ends, strict=True)
        ]
        new = [place for place, (text, _) in enumerate(rows.anchors) if text not in self._texts]
        self._texts.update(text for text, _ in rows.anchors)
        entry = ShardEntry(name, digest_of_rows(data), rows.size, len(rows.pairs), tuple(kinds), tuple(new))
        self._shards.append(entry)
        self._most = self._most.or_more(rows.most) if rows.most else self._most
        self._has_heldout |= rows.heldout is not None
        self.masked += rows.masked
        self.lost += rows.lost
        for image in rows.images:
            self.twins += image in self._images
            self._images.add(image)

    def index(self, encoding: Encoding, dataset: str) -> Index:
        """The index.

        Raises:
            ValueError: there are no images.
        """
        if not any(shard.examples for shard in self._shards):
            raise ValueError(f"{dataset} has no usable images")
        return Index(encoding, dataset, True, tuple(self._kinds), tuple(self._shards), self._most, self._has_heldout)
