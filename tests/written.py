"""Datasets written for a test: images, captions, rows."""

import json
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dopsd_core.data.dataset import DatasetReport, read_dataset


def require_case(folder: Path) -> None:
    """Skips the test where names that differ in case alone are one file."""
    (folder / ".Case").touch()
    if (folder / ".case").exists():
        pytest.skip("the file system does not tell upper from lower case")


def image_file(
    path: Path, colour: object = None, size: tuple[int, int] = (64, 64), mode: str = "RGB", **save: object
) -> Path:
    """An image file whose pixels differ from those of other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = zlib.crc32(path.name.encode())
    default = (shade & 255, shade >> 8 & 255, shade >> 16 & 255)
    Image.new(mode, size, default if colour is None else colour).save(path, **save)  # type: ignore[arg-type]
    return path


def pair(folder: Path, name: str, caption: str = "a [V] emblem", **kwargs: object) -> Path:
    """An image with its caption."""
    path = image_file(folder / name, **kwargs)  # type: ignore[arg-type]
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def read(source: Path, **kwargs: object) -> DatasetReport:
    return read_dataset(source, **{"pixel_budget": 4096, "multiple": 16, **kwargs})  # type: ignore[arg-type]


def rows(file: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def only(problems: tuple, file: Path, line: int | None, *words: str) -> None:
    """Asserts that there is one problem, at this place, whose message has these words."""
    assert len(problems) == 1, [str(problem) for problem in problems]
    assert (problems[0].file, problems[0].line) == (file, line)
    for word in words:
        assert word in problems[0].message
