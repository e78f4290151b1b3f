"""Matches the caption files of a folder to images by name, and finds near misses for images without caption.

Names are compared in NFC, so that an é from macOS (NFD) equals one from Linux or Windows. Where no name matches
exactly, upper and lower case are ignored.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

CAPTION_SUFFIX = ".txt"

_OTHER_TEXTS = (".caption", ".captions", ".cap", ".text", ".tags")
_STRUCTURED = (".json", ".yaml", ".yml", ".md", ".csv", ".xml")
_MASK = re.compile(r"(?i)[._ -](?:mask|masklabel|alpha|matte)s?$")

Key = TypeVar("Key")

Place = tuple[Path, str]
"""(folder of a file, its name in the form that is compared)."""


def composed(name: str) -> str:
    """The name in NFC."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """The name in NFC and case-folded."""
    return composed(composed(name).casefold())


def place_of(file: Path) -> Place:
    """Equal for files in the same folder whose stems differ at most in case or Unicode composition."""
    return file.parent, folded(file.stem)


@dataclass(frozen=True)
class CaptionFiles:
    """The files of a dataset folder, indexed to find the caption of an image.

    Attributes:
        root: the folder; names in messages are relative to it.
        captions: the .txt files by place.
        near: other files with the name of an image and any further suffix, by place.
        elsewhere: the .txt files by name only.
        images: the images by place.
        exact: the places of the images, case-sensitive.
    """

    root: Path
    captions: dict[Place, list[Path]]
    near: dict[Place, list[Path]]
    elsewhere: dict[str, list[Path]]
    images: dict[Place, list[Path]]
    exact: frozenset[Place]

    @classmethod
    def sort(cls, root: Path, files: Sequence[Path], images: Sequence[Path], suffixes: Sequence[str]) -> CaptionFiles:
        """Indexes a folder.

        Args:
            root: the folder.
            files: all files of the folder.
            images: the images that need a caption.
            suffixes: suffixes of image files, in lower case.
        """
        texts = [file for file in files if file.suffix.lower() == CAPTION_SUFFIX]
        others = [file for file in files if file.suffix.lower() not in suffixes]
        return cls(
            root,
            captions=_grouped((place_of(text), text) for text in texts),
            near=_grouped(((file.parent, folded(_bare(file.name, suffixes))), file) for file in others),
            elsewhere=_grouped((folded(text.stem), text) for text in texts),
            images=_grouped((place_of(image), image) for image in images),
            exact=frozenset((image.parent, composed(image.stem)) for image in images),
        )

    def of(self, image: Path) -> list[Path]:
        """The caption files of an image, normally one. A file with other case counts if no image matches exactly."""
        found = self.captions.get(place_of(image), [])
        return [file for file in found if self.names_exactly(file, image) or not self._belongs_exactly(file)]

    def names_exactly(self, file: Path, image: Path) -> bool:
        """Whether the stems are equal, including case."""
        return composed(file.stem) == composed(image.stem)

    def _belongs_exactly(self, file: Path) -> bool:
        return (file.parent, composed(file.stem)) in self.exact

    def near_misses(self, image: Path) -> tuple[list[Path], str]:
        """(files that may be the caption of an image without one, a hint about the first of them)."""
        beside = [file for file in self.near.get(place_of(image), []) if file not in self.of(image)]
        wanted = image.with_suffix(CAPTION_SUFFIX).name
        if beside:
            first = next((file for file in beside if folded(file.name).startswith(folded(image.name))), beside[0])
            if self._belongs_exactly(first) and first.suffix.lower() == CAPTION_SUFFIX:
                return beside, f"there is {first.name}, which belongs to another image"
            if first.suffix.lower() in _STRUCTURED:
                return beside, f"there is {first.name}: only .txt is read, write its caption to {wanted}"
            return beside, f"there is {first.name}: rename it to {wanted}"
        away = [file for file in self.elsewhere.get(folded(image.stem), []) if not self.images.get(place_of(file))]
        if away:
            return away[:1], f"there is {away[0].relative_to(self.root)}: move it beside the image"
        whole = self.masked_by(image)
        if whole is None:
            return [], ""
        return [], f"a mask of {whole.name}? rename it to {mask_name(whole, image)}, or move it out of the folder"

    def masked_by(self, image: Path) -> Path | None:
        """The image of which this one is the mask, by its name: a.png for a-mask.png; None without one."""
        bare = _MASK.sub("", image.stem)
        found = self.images.get((image.parent, folded(bare))) if bare != image.stem else None
        return found[0] if found else None


def mask_name(image: Path, mask: Path) -> str:
    """The name that the mask of an image must have: a.mask.png for a.jpg and a_Mask.PNG."""
    return f"{image.stem}.mask{mask.suffix.lower()}"


def _grouped(items: Iterable[tuple[Key, Path]]) -> dict[Key, list[Path]]:
    groups: dict[Key, list[Path]] = {}
    for key, file in items:
        groups.setdefault(key, []).append(file)
    return groups


def _bare(name: str, suffixes: Sequence[str]) -> str:
    """`a` of a.caption, a.png.txt, a.txt.txt, a_caption.txt and the like."""
    name, known = name.rstrip(), (CAPTION_SUFFIX, *_OTHER_TEXTS, *_STRUCTURED, *suffixes)
    while (suffix := Path(name).suffix.lower()) in known and suffix:
        name = name[: -len(suffix)].rstrip()
    return re.sub(r"(?i)[._ -]captions?$", "", name)
