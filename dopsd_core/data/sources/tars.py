"""WebDataset tars as a source: 000017.jpg with its caption in 000017.txt, or under a key of 000017.json.

Files of one image have the same name up to the first dot. Nothing is unpacked under a name from the tar, and links,
devices and names that leave the folder are refused.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..captions import MAX_BYTES, CaptionError, check_text, decode_utf8, is_blank, row_captions
from ..folder import UNREAD_SUFFIXES, Entry
from ..images import SUFFIXES
from ..masks import MASK
from ..problems import Problem, Problems
from .base import Chunk, digest_of, file_facts

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_IMAGE = 1 << 28
"""Maximum size of an image file in bytes."""

_TEXTS = (".txt", ".caption")
_BLOCK = 512
_BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)

_READ = {*SUFFIXES, *UNREAD_SUFFIXES, *_TEXTS, ".json", *(f"{MASK}{suffix}" for suffix in SUFFIXES)}
"""Endings that matter; those of images that cannot be read are errors."""

Member = tuple[str, tarfile.TarInfo]
"""(extension with its dot, in lower case, member)."""


def tars_of(place: Path) -> list[Path]:
    """The tars of a path: itself, or those directly in a folder that has no images; sorted by name."""
    if place.is_file():
        return [place] if place.name.lower().endswith(TARS) else []
    if not place.is_dir():
        return []
    files = [file for file in sorted(place.iterdir()) if not file.name.startswith(".")]
    if any(file.suffix.lower() in SUFFIXES for file in files):
        return []
    return [file for file in files if file.name.lower().endswith(TARS) and file.is_file()]


class TarSource:
    """Tars; each is a part."""

    has_edits = False
    root: Path | None = None
    problems: Sequence[Problem] = ()

    def __init__(self, tars: Sequence[Path], size: int) -> None:
        self._tars, self._size = tuple(tars), size
        self.digest = digest_of([(tar.name, tar.stat().st_size) for tar in tars], size)

    @property
    def title(self) -> str:
        """The path, or the folder."""
        return str(self._tars[0] if len(self._tars) == 1 else self._tars[0].parent)

    def known_captions(self) -> Iterator[tuple[str, str]]:
        """None: they are not read in advance."""
        return iter(())

    @property
    def parts(self) -> int:
        """Number of tars."""
        return len(self._tars)

    def count(self, parts: Sequence[int]) -> int | None:
        """None: the tars are not read in advance."""
        return None

    def chunks(self, part: int) -> Iterator[Chunk]:
        """The images of a tar, in its order."""
        tar = self._tars[part]
        with _opened(tar) as archive:
            groups = _groups(archive)
            for number, first in enumerate(range(0, max(1, len(groups)), self._size)):
                some = groups[first : first + self._size]
                stamp = digest_of(file_facts(tar), first, len(some))

                def entries(folder: Path, problems: Problems, some=some, first=first) -> list[Entry]:
                    reader = _Reader(tar, archive, folder, problems)
                    return reader.entries(some, first)

                yield Chunk(number, first + self._size >= len(groups), len(some), stamp, entries)


@contextmanager
def _opened(tar: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(tar) as archive:
            yield archive
    except _BROKEN as error:
        raise ValueError(f"{tar} cannot be read as a tar: {error}") from error


def _groups(archive: tarfile.TarFile) -> list[tuple[str, list[Member]]]:
    """The members by the name that they share, in the order in which the names occur; hidden files are ignored.

    Raises:
        TarError: the tar is cut off, which tarfile reports only inside a member.
    """
    groups: dict[str, list[Member]] = {}
    members = archive.getmembers()
    archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
    if archive.fileobj.read(_BLOCK) != bytes(_BLOCK):  # type: ignore[union-attr]
        raise tarfile.ReadError("it is cut off, it has no end: copy or pack it again")
    for member in members:
        path = PurePosixPath(member.name)
        if member.isdir() or path.name.startswith("."):
            continue
        stem, dot, ending = path.name.partition(".")
        groups.setdefault(str(path.with_name(stem)), []).append((f"{dot}{ending}".lower(), member))
    return list(groups.items())


class _Reader:
    """Unpacks the images of a chunk under names of its own, `<number><suffix>`."""

    def __init__(self, tar: Path, archive: tarfile.TarFile, folder: Path, problems: Problems) -> None:
        self._tar, self._archive, self._folder, self._problems = tar, archive, folder, problems

    def entries(self, groups: Sequence[tuple[str, list[Member]]], first: int) -> list[Entry]:
        """The images; `first` is the index of the first one in the tar."""
        if not groups:
            self._error("has no images with captions")
        self._note_unread(groups)
        for name, members in groups:
            self._require_no_dots(name, [ending for ending, _ in members])
        groups = [(name, members) for name, members in groups if any(ending in _READ for ending, _ in members)]
        found = [self._entry(first + place, name, members) for place, (name, members) in enumerate(groups)]
        return [entry for entry in found if entry is not None]

    def _entry(self, number: int, name: str, members: Sequence[Member]) -> Entry | None:
        for _, member in members:
            if why := _refusal(member):
                return self._error(f"the member {member.name!r} {why}; pack it again without it")
        images = [(ending, member) for ending, member in members if ending in SUFFIXES]
        if len(images) != 1:
            strange = [ending for ending, _ in members if ending in UNREAD_SUFFIXES]
            hint = f"; convert {strange[0]} files to PNG, JPEG, WebP or BMP" if strange else ""
            return self._error(f"{name!r} has {len(images)} images, it must have one{hint}")
        captions, repeats = self._captions(name, dict(members))
        if not captions:
            return None
        ending, member = images[0]
        target = self._folder / f"{number:06d}{ending}"
        try:
            target.write_bytes(self._read(member, MAX_IMAGE))
            for suffix in SUFFIXES:
                if (mask := dict(members).get(f"{MASK}{suffix}")) is not None:
                    target.with_name(f"{target.stem}{MASK}{suffix}").write_bytes(self._read(mask, MAX_IMAGE))
        except ValueError as error:
            return self._error(str(error))
        return Entry(target, captions, self._tar, number + 1, repeats)

    def _captions(self, name: str, members: Mapping[str, tarfile.TarInfo]) -> tuple[tuple[str, ...], int]:
        """(captions, repeats); no captions after reporting why."""
        try:
            for ending in _TEXTS:
                if ending in members:
                    text = decode_utf8(self._read(members[ending], MAX_BYTES))
                    check_text(text)
                    if is_blank(text):
                        raise CaptionError("the caption is empty; write what the image shows")
                    return (text.strip(),), 1
            if ".json" not in members:
                raise CaptionError(f"has no caption: pack {PurePosixPath(name).name}.txt beside the image")
            row = json.loads(decode_utf8(self._read(members[".json"], MAX_BYTES)))
        except (ValueError, RecursionError) as error:
            self._error(f"{name!r}: {error}")
            return (), 1
        found = row_captions(row) if isinstance(row, dict) else None
        if found is None or found.errors or not found.texts:
            why = [*found.errors, *found.complaints] if found is not None else []
            self._error(f"{name!r}: {'; '.join(why) or 'the .json has no caption'}")
            return (), 1
        return tuple(found.texts.values()), 1

    def _read(self, member: tarfile.TarInfo, most: int) -> bytes:
        if member.size > most:
            raise ValueError(f"the member {member.name!r} has {member.size / 2**20:.0f} MB, more than {most >> 20}")
        try:
            file = self._archive.extractfile(member)
            data = file.read() if file is not None else b""
        except _BROKEN as error:
            raise ValueError(f"the member {member.name!r} cannot be read ({error}): copy the tar again") from error
        if len(data) != member.size:
            raise ValueError(f"the member {member.name!r} is cut off: copy the tar again")
        return data

    def _note_unread(self, groups: Sequence[tuple[str, list[Member]]]) -> None:
        endings = dict.fromkeys(ending for _, members in groups for ending, _ in members if ending not in _READ)
        if endings:
            message = f"the files {', '.join(map(repr, list(endings)[:8]))} are not read"
            self._problems.warning(self._tar, None, message)

    def _require_no_dots(self, name: str, endings: Sequence[str]) -> None:
        """Reports images that are lost because their names have dots, as `a.1.png`; others may stand beside `a.png`."""
        dotted = [ending for ending in endings if ending.endswith(SUFFIXES) and ending not in _READ]
        if dotted and not any(ending in _READ for ending in endings):
            self._error(
                f"{name + dotted[0]!r} has a dot in its name, of which only the part before the first dot counts: pack "
                "it again under a name without"
            )

    def _error(self, message: str) -> None:
        self._problems.error(self._tar, None, message)


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member is not read; "" if it is."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(member.name).drive:
        return "has a name that leaves the folder"
    if not member.isfile():
        return "is a link or device, not a file"
    return ""
