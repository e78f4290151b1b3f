"""Hugging Face datasets as a source, by the library `datasets`: hf:owner/name on the hub, streamed, or hf:./folder.

A folder is what `save_to_disk` wrote, or files that `load_dataset` reads, such as Parquet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from ...lazy_sequence import Lazy
from ..captions import row_captions
from ..folder import Entry
from ..problems import Problem, Problems
from .base import Chunk, Columns, digest_of, file_facts

PREFIX = "hf:"

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"BM", ".bmp"), (b"RIFF", ".webp"))


def open_hugging_face(name: str, size: int, columns: Columns) -> HuggingFaceSource:
    """The dataset on the hub or in a folder, chunks of `size` images.

    Raises:
        ModuleNotFoundError: `datasets` is missing.
        ValueError: it cannot be loaded, or has no such column.
    """
    try:
        datasets: Any = import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(f'{PREFIX}{name} needs datasets: pip install "comfyui-dopsd[datasets]"') from error
    folder = Path(name)
    if not folder.exists() and not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"{PREFIX}{name} is not there, nor is it a name on the Hugging Face hub: write {PREFIX}owner/name"
        )
    try:
        version = _version(name, folder, columns)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            found: Any = datasets.load_from_disk(str(folder))
            found = found[columns.split] if isinstance(found, dict) else found
        else:
            revision = {} if folder.exists() else {"revision": version}
            found = datasets.load_dataset(
                name, columns.subset or None, split=columns.split, streaming=True, **revision
            )  # fmt: skip
        found = _resolved(found)
    except Exception as error:  # the library raises errors of many kinds
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{PREFIX}{name} cannot be loaded: {why[0]}") from error
    image = _image_column(found, name, columns, datasets)
    return HuggingFaceSource(
        name, size, columns, found.cast_column(image, datasets.Image(decode=False)), image, version
    )


class HuggingFaceSource:
    """A dataset: chunks of rows if it is on this disk, otherwise the library's own shards as parts."""

    has_edits = False
    root: Path | None = None
    problems: Sequence[Problem] = ()

    def __init__(self, name: str, size: int, columns: Columns, rows: Any, image: str, version: str) -> None:
        self._name, self._size, self._columns, self._rows, self._image = name, size, columns, rows, image
        self._version = version
        self._has_length = hasattr(rows, "__len__")
        self.digest = digest_of(name, version, image, vars(columns), self.parts, size)

    @property
    def title(self) -> str:
        """The name with its prefix."""
        return PREFIX + self._name

    def known_captions(self) -> Iterator[tuple[str, str]]:
        """None: they are not read in advance."""
        return iter(())

    @property
    def parts(self) -> int:
        """Number of chunks, or of the library's shards."""
        return -(-len(self._rows) // self._size) if self._has_length else self._rows.num_shards

    def count(self, parts: Sequence[int]) -> int | None:
        """Number of rows in these parts, if the library knows it."""
        if self._has_length:
            return sum(min(self._size, len(self._rows) - part * self._size) for part in parts)
        known = (self._rows.info.splits or {}).get(self._columns.split)
        return round(known.num_examples * len(parts) / self.parts) if known and known.num_examples else None

    def chunks(self, part: int) -> Iterator[Chunk]:
        """The rows of a part in their order."""
        if self._has_length:
            first = part * self._size
            places = range(first, min(first + self._size, len(self._rows)))
            yield self._chunk(part, 0, Lazy(len(places), lambda place: self._rows[places[place]]), first, True)
            return
        rows = iter(self._rows.shard(num_shards=self.parts, index=part))
        number, some = 0, list(islice(rows, self._size))
        while True:
            following = list(islice(rows, self._size)) if len(some) == self._size else []
            yield self._chunk(part, number, some, number * self._size, not following)
            if not following:
                return
            number, some = number + 1, following

    def _chunk(self, part: int, number: int, rows: Sequence[Mapping[str, Any]], first: int, is_last: bool) -> Chunk:
        stamp = digest_of(self.digest, part, first, len(rows))

        def entries(folder: Path, problems: Problems) -> list[Entry]:
            found = [self._entry(folder, problems, part, first + place, row) for place, row in enumerate(rows)]
            return [entry for entry in found if entry is not None]

        return Chunk(number, is_last, len(rows), stamp, entries)

    def _entry(
        self, folder: Path, problems: Problems, part: int, number: int, row: Mapping[str, Any]
    ) -> Entry | None:  # fmt: skip
        place = Path(f"{self.title} part {part}" if not self._has_length else self.title)
        data = _bytes_of(row.get(self._image), Path(self._name))
        if not data:
            message = f"the row has no image in the column {self._image!r}; leave it out, or choose --image-column"
            return problems.error(place, number + 1, message)
        column = self._columns.caption_column
        found = row_captions({"caption": row.get(column)} if column else row)
        for message in found.errors or ([] if found.texts else found.complaints or ["the row has no caption"]):
            problems.error(place, number + 1, message)
        if found.errors or not found.texts:
            return None
        suffix = next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), ".png")
        image = folder / f"{number:06d}{suffix}"
        image.write_bytes(data)
        return Entry(image, tuple(found.texts.values()), place, number + 1)


def _bytes_of(value: object, folder: Path) -> bytes | None:
    """The bytes of an image; a path is read only inside the dataset's folder, since a row may name any file."""
    if not isinstance(value, Mapping):
        return None
    if value.get("bytes") is not None:
        return value["bytes"]
    path = Path(value.get("path") or "").resolve()
    return path.read_bytes() if path.is_file() and path.is_relative_to(folder.resolve()) else None


def _version(name: str, folder: Path, columns: Columns) -> str:
    """The commit on the hub, or a digest of the files of a folder."""
    if folder.exists():
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [folder]
        return digest_of([file_facts(file) for file in files])
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=columns.revision or None).sha or ""


def _resolved(rows: Any) -> Any:
    """With its features: a stream may not know them before its first row."""
    return rows._resolve_features() if getattr(rows, "features", None) is None else rows


def _image_column(rows: Any, name: str, columns: Columns, datasets: Any) -> str:
    features = rows.features
    if column := columns.image_column:
        if column not in features:
            raise ValueError(f"{PREFIX}{name} has no column {column!r}, only {', '.join(features)}")
        return column
    if columns.caption_column and columns.caption_column not in features:
        raise ValueError(f"{PREFIX}{name} has no column {columns.caption_column!r}, only {', '.join(features)}")
    found = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        what = "several columns with images" if found else "no column with images"
        raise ValueError(f"{PREFIX}{name} has {what} ({', '.join(found or features)}): choose one with --image-column")
    return found[0]
