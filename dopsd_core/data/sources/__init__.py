"""Sources of images for `encode`: folders and JSONL files, WebDataset tars, Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path

from .base import Chunk, Columns, Source
from .files import FileSource
from .hugging_face import PREFIX, open_hugging_face
from .tars import TarSource, tars_of

__all__ = ["Chunk", "Columns", "Source", "open_source"]


def open_source(name: str, size: int, root: Path | None = None, columns: Columns | None = None) -> Source:
    """The source of a name: a folder, a .jsonl file, a .tar or a folder of them, or hf:NAME for a dataset.

    Args:
        size: images per shard.
        root: of a folder or JSONL, the folder that must contain all images.
        columns: of a Hugging Face dataset, which part and columns to read.

    Raises:
        ValueError: it does not exist, or an option does not fit it.
        ModuleNotFoundError: `datasets` is missing.
    """
    is_hugging_face, tars = name.startswith(PREFIX), tars_of(Path(name))
    if root is not None and (is_hugging_face or tars):
        raise ValueError("--root is for folders and JSONL files; tars and hf: datasets contain their images")
    if columns is not None and not is_hugging_face:
        raise ValueError(f"{columns.options()[0]} is for Hugging Face datasets: write {PREFIX}{name}, or leave it out")
    if is_hugging_face:
        return open_hugging_face(name.removeprefix(PREFIX), size, columns or Columns())
    return TarSource(tars, size) if tars else FileSource(Path(name), size, root)
