"""Begins and completes the folder of an encoded dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text import printable
from .encoding import Encoding
from .index import AGAIN, INDEX, Index, IndexMaker, rows_file, shard_name
from .writer import read_rows


def begin(folder: Path, encoding: Encoding, dataset: str) -> None:
    """Creates the folder, or checks that what it contains was encoded in the same way; marks it as incomplete.

    Raises:
        ValueError: it contains another encoding.
        DiskError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        try:
            before: Index | None = Index.read(folder)
        except ValueError:  # torn, or an older version: the shards say themselves how they were encoded
            before = None
        if before is not None and (changed := before.encoding.differences(encoding)):
            raise ValueError(
                printable(f"{folder} contains another encoding: choose another folder, or undo {', '.join(changed)}")
            )
    Index(encoding, dataset).write(folder)


@dataclass(frozen=True)
class Finished:
    """A complete encoded dataset.

    Attributes:
        index: its index, which is written.
        remarks: warnings about it, one sentence each.
    """

    index: Index
    remarks: tuple[str, ...]


def finish(folder: Path, encoding: Encoding, dataset: str, parts: int) -> Finished:
    """Writes the index of all shards and removes the shards of a former, longer dataset.

    Raises:
        ValueError: a shard is missing, there are no images, none for the held-out caption, or no masks although the
            teacher needs them.
        DiskError: the index cannot be written.
    """
    maker, names = IndexMaker(), set[str]()
    digest = encoding.digest()
    for part in range(parts):
        number, is_last = 0, False
        while not is_last:
            name = shard_name(part, number)
            found = read_rows(folder, name)
            if found is None or found[1].encoding != digest:
                raise ValueError(
                    printable(
                        f"{rows_file(folder, name)} is missing: all processes need the same --output, on a shared file "
                        f"system; {AGAIN}"
                    )
                )
            maker.add(name, *found)
            names.add(name)
            number, is_last = number + 1, found[1].is_last
    index = maker.index(encoding, dataset)
    if encoding.heldout and not index.has_heldout:
        raise ValueError("the held-out caption is read with the first images, and none of the first shard can be used")
    remarks = _remarks(maker, encoding)
    index.write(folder)
    for file in folder.glob("shard-*-*.*"):
        if file.stem not in names and file.suffix in (".json", ".safetensors"):
            file.unlink()
    return Finished(index, tuple(remarks))


def _remarks(maker: IndexMaker, encoding: Encoding) -> Sequence[str]:
    """Raises ValueError if there are no masks although the teacher needs them."""
    if encoding.background != "keep" and not maker.masked:
        raise ValueError(
            f"--teacher-background {encoding.background} needs masks, and no image has one: put a.mask.png beside "
            "a.png, white where the subject is, or set it to keep"
        )
    remarks = []
    if maker.twins:
        remarks.append(f"{maker.twins} images are the same as others of the dataset: remove them, or train with them")
    if maker.lost:
        remarks.append(f"{maker.lost} images were left out because of errors")
    return remarks
