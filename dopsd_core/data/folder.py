"""Reads a dataset folder as entries, without opening the images.

photos/a.png            an image
photos/a.txt            its caption
photos/a.mask.png       its mask, if there is one (`masks.py`)
photos/trigger.txt      the trigger of the folder's images, if there are several concepts (`triggers.py`)

edits/target/a.png      the target of an edit
edits/target/a.txt      its instruction
edits/source/a.jpg      its source image

Other files are reported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .caption_files import CaptionFiles, Place, composed, folded, mask_name, place_of
from .captions import CaptionError, Kind, read_caption_file
from .images import SUFFIXES
from .masks import MASK, is_named_as_mask, masks_beside
from .problems import Problem, Problems
from .repeats import NamedRepeats
from .triggers import TRIGGER_NAME, NamedTriggers

__all__ = ["Entry", "Problem", "Problems", "edit_folders", "read_folder"]

UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg")
ROW_SUFFIXES = (".jsonl", ".ndjson")
_NO_DATA = re.compile(r"(?i)(readme|licen[sc]e|classes|requirements)(\..*)?|(eh)?thumbs\.db|desktop\.ini|icon\r")
"""Names of files that come with datasets and systems and are ignored without a warning, unless they belong to an image
of that name."""


@dataclass(frozen=True)
class Entry:
    """An image or edit as the dataset describes it.

    Attributes:
        image: the image file; the target of an edit.
        captions: empty if a problem was reported instead.
        caption_file: the file that contains the captions.
        caption_line: the line of a JSONL file; None in a folder.
        repeats: visits per epoch.
        declared: (width, height) stated by a row.
        source_images: the source images of an edit, in order.
        text_line: the line of a caption file where its text begins.
        trigger: the word of its concept, from a trigger.txt or the row; "" for that of the dataset.
        near_miss: a hint about another file that may be the missing caption, or a mask; "" without one.
    """

    image: Path
    captions: tuple[str, ...]
    caption_file: Path
    caption_line: int | None = None
    repeats: int = 1
    declared: tuple[int, int] | None = None
    source_images: tuple[Path, ...] = ()
    text_line: int = 1
    near_miss: str = ""
    trigger: str = ""

    @property
    def is_uncaptioned(self) -> bool:
        """Whether no caption file was found for an image in a folder."""
        return not self.captions and self.caption_file == self.image


def read_folder(folder: Path, problems: Problems) -> list[Entry]:
    """The images of a folder and its subfolders, sorted by name, with their captions; hidden files are ignored.

    In a folder with the subfolders source/ and target/ only these two are read, as edits.
    """
    files = _data_files(_walk(folder, problems))
    images, masks = _without_masks([file for file in files if file.suffix.lower() in SUFFIXES])
    halves = edit_folders(folder)
    captioned = images if halves is None else [file for file in images if file.is_relative_to(halves[1])]
    reader = _FolderReader(folder, files, CaptionFiles.sort(folder, files, captioned, SUFFIXES), problems)
    if halves is None:
        entries = [reader.entry(image) for image in images]
    else:
        entries = _EditFolder(folder, *halves, reader, problems).entries(images)
    reader.note_shared_captions()
    reader.note_captions_of_masks(masks)
    reader.note_unread()
    return entries


def _data_files(files: Sequence[Path]) -> list[Path]:
    """The files without a LICENSE, README.md or the like; license.png is an image, and license.txt beside it its
    caption."""
    images = (*SUFFIXES, *UNREAD_SUFFIXES)
    places = {place_of(file) for file in files if file.suffix.lower() in images}
    return [file for file in files if _NO_DATA.fullmatch(file.name) is None or place_of(file) in places]


def _without_masks(images: Sequence[Path]) -> tuple[list[Path], dict[Path, Path]]:
    """(the images without the masks of others among them, the image of each mask)."""
    masks = {mask: image for image in images if not is_named_as_mask(image) for mask in masks_beside(image)}
    return [image for image in images if image not in masks], masks


def edit_folders(folder: Path) -> tuple[Path, Path] | None:
    """The subfolders source/ and target/ of a folder of edits (case-insensitive); None if one is missing."""
    try:
        found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    except OSError:
        return None
    return (found["source"], found["target"]) if {"source", "target"} <= found.keys() else None


@dataclass
class _FolderReader:
    """Finds the caption and the repeats of each image, and reports the remaining files.

    named: files that a message already mentions. used: the images of each caption file.
    """

    folder: Path
    files: Sequence[Path]
    captions: CaptionFiles
    problems: Problems
    named: set[Path] = field(default_factory=set)
    used: dict[Path, list[Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._repeats = NamedRepeats(self.folder, self.problems)
        captions = {file for image in self.captions.images.values() for file in self.captions.of(image[0])}
        named = {file for file in self.files if file.name.lower() == TRIGGER_NAME} - captions
        self._triggers = NamedTriggers(self.folder, named, self.problems)
        self.named.update(named)
        self._rows = next((file for file in self.files if file.suffix.lower() in ROW_SUFFIXES), None)

    def entry(self, image: Path, kind: Kind = "caption") -> Entry:
        """The image with its caption; reports a problem if there is no valid one."""
        found = self.captions.of(image)
        for file in found:
            self.used.setdefault(file, []).append(image)
        repeats, trigger = self._repeats.of(image), self._triggers.of(image)
        if not found:
            return Entry(image, (), image, None, repeats, near_miss=self._note_lack(image, kind), trigger=trigger)
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            self.problems.error(image, None, f"{len(found)} {kind}s with its name: {names}; keep one")
            return Entry(image, (), found[0], None, repeats)
        if not self.captions.names_exactly(found[0], image):
            message = f"used as the {kind} of {image.name}: the names differ in upper and lower case; make them equal"
            self.problems.warning(found[0], None, message)
        self._warn_of_mask(image)
        text = self._text(found[0], kind)
        before = text[: len(text) - len(text.lstrip())]
        texts = (text.strip(),) if text else ()
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        return Entry(image, texts, found[0], None, repeats, text_line=line, trigger=trigger)

    def _text(self, file: Path, kind: Kind) -> str:
        """The text of a caption file, or "" after reporting why it is invalid."""
        try:
            if not file.resolve().is_relative_to(self.folder.resolve()):
                raise CaptionError(f"is outside of the folder {self.folder}")
            return read_caption_file(file, kind)
        except CaptionError as error:
            self.problems.error(file, error.line or 1, str(error))
        except OSError as error:
            self.problems.error(file, None, f"cannot be read: {error.strerror}")
        except RuntimeError:  # raised by Python up to 3.12
            self.problems.error(file, None, "cannot be read: a circular link")
        return ""

    def _note_lack(self, image: Path, kind: Kind) -> str:
        """Reports an image without caption, and returns the hint about a file that may be it."""
        meant, near = self.captions.near_misses(image)
        self.named.update(meant)
        remark = near
        if not remark and self._rows is not None:
            self.named.add(self._rows)
            remark = f"there is {self._rows.name}: to read that file, give its path"
        if not remark and is_named_as_mask(image):
            remark = f"it is no mask: there is no image {image.stem[: -len(MASK)]} beside it"
        hint = f" ({remark})" if remark else ""
        self.problems.error(image, None, f"no {kind}: write it to {image.with_suffix('.txt').name} beside it{hint}")
        return near

    def _warn_of_mask(self, image: Path) -> None:
        """Warns of an image with a caption that is named as a mask: of no image, or in another way than masks are."""
        if is_named_as_mask(image):
            whole = image.stem[: -len(MASK)]
            message = f"named as a mask, but there is no image {whole} beside it: it is used as an image"
            self.problems.warning(image, None, message)
        elif whole := self.captions.masked_by(image):
            meant = mask_name(whole, image)
            message = f"named as a mask of {whole.name}, but has a caption: it is used as an image; if it is a mask, "
            self.problems.warning(image, None, f"{message}rename it to {meant} and delete the caption")

    def note_captions_of_masks(self, masks: Mapping[Path, Path]) -> None:
        """Warns of captions of masks, such as a program writes for every file. masks: the image of each mask."""
        for mask, image in masks.items():
            for file in self.captions.of(mask):
                self.named.add(file)
                message = f"not used: {mask.name} is the mask of {image.name}; delete this caption"
                self.problems.warning(file, None, message)

    def note_shared_captions(self) -> None:
        """Warns of images with the same name, which share one caption."""
        for file, images in self.used.items():
            if len(images) > 1:
                names = " and ".join(image.name for image in images)
                message = f"{names} share the caption {file.name}: rename or remove one"
                self.problems.warning(images[0], None, message)

    def note_unread(self) -> None:
        """Reports what was not read: captions without an image, and other files, once per kind."""
        images = (*SUFFIXES, *UNREAD_SUFFIXES)
        places = {place_of(file) for file in self.files if file.suffix.lower() in images}
        rest: dict[str, list[Path]] = {}
        for file in self.files:
            suffix = file.suffix.lower()
            if suffix in SUFFIXES or file in self.used or file in self.named:
                continue
            if suffix != ".txt":
                rest.setdefault(suffix, []).append(file)
            elif place_of(file) not in places:
                self.problems.warning(file, None, "a caption without an image of the same name")
        for suffix, files in rest.items():
            count = len(files) - 1
            more = f", like {count} more {f'{suffix} file'.strip()}{'s' * (count > 1)}" if count else ""
            self.problems.warning(files[0], None, f"not read{more}: {_what_to_do(suffix)}")


def _what_to_do(suffix: str) -> str:
    if suffix in UNREAD_SUFFIXES:
        return f"convert {suffix} files to PNG, JPEG, WebP or BMP"
    if suffix in ROW_SUFFIXES:
        return "to read it, give its path instead of the folder's"
    return "only images and .txt captions are read from a folder"


@dataclass(frozen=True)
class _EditFolder:
    """Pairs the files in target/ with those of the same path in source/, ignoring suffixes."""

    folder: Path
    source: Path
    target: Path
    reader: _FolderReader
    problems: Problems

    def entries(self, images: Sequence[Path]) -> list[Entry]:
        """An entry for each image in target/; other images are reported."""
        starts: dict[Place, list[Path]] = {}
        targets: dict[Path, Place] = {}
        for image in images:
            if image.is_relative_to(self.target):
                targets[image] = _place_below(self.target, image)
            elif image.is_relative_to(self.source):
                starts.setdefault(_place_below(self.source, image), []).append(image)
            else:
                self.problems.error(image, None, "is outside of source/ and target/: move it into one of them")
        wanted = set(targets.values())
        loose = {_folded_place(place): place for place in starts if place not in wanted}
        found = {target: self._start(place, starts, loose) for target, place in targets.items()}
        entries = [self._entry(target, starts.get(found[target], ())) for target in targets]
        self._note_sources(starts, set(found.values()))
        return entries

    def _start(self, target: Place, starts: Mapping[Place, Sequence[Path]], loose: Mapping[Place, Place]) -> Place:
        """The place in source/ for one in target/: the same, or else one that differs only in case."""
        other = loose.get(_folded_place(target))
        if target in starts or other is None:
            return target
        message = f"used as the source of {target[1]}: the names differ in upper and lower case; make them equal"
        self.problems.warning(starts[other][0], None, message)
        return other

    def _entry(self, target: Path, found: Sequence[Path]) -> Entry:
        start = self.source / target.relative_to(self.target).with_suffix("")
        entry = self.reader.entry(target, "instruction")
        if not found:
            place = f"{start.relative_to(self.folder)}{target.suffix}"
            self.problems.error(target, None, f"no source: put the source image of this edit at {place}")
        self._note_strays(start, entry)
        return replace(entry, source_images=tuple(found), captions=entry.captions if len(found) == 1 else ())

    def _note_strays(self, start: Path, entry: Entry) -> None:
        """Warns of a caption next to the source if the target has its own."""
        for stray in self.reader.captions.captions.get((start.parent, folded(start.name)), ()):
            if entry.captions:
                message = f"not read: the instruction is the one in {entry.caption_file.parent.name}/"
                self.problems.warning(stray, None, message)
                self.reader.named.add(stray)

    def _note_sources(self, starts: Mapping[Place, Sequence[Path]], used: Collection[Place]) -> None:
        for start, found in starts.items():
            if len(found) > 1:
                names = ", ".join(path.name for path in found)
                self.problems.error(found[0], None, f"{len(found)} sources with the same name: {names}; keep one")
            if start not in used:
                place = self.target.relative_to(self.folder) / found[0].relative_to(self.source).with_suffix("")
                message = f"a source without a target: the edited image is missing at {place}.*"
                self.problems.warning(found[0], None, message)


def _place_below(half: Path, image: Path) -> Place:
    """The key that a source and its target share: the folder below source/ or target/, and the name."""
    inside = image.relative_to(half)
    return Path(*map(composed, inside.parent.parts)), composed(inside.stem)


def _folded_place(place: Place) -> Place:
    return Path(*map(folded, place[0].parts)), folded(place[1])


def _walk(folder: Path, problems: Problems) -> list[Path]:
    """All files below a folder, sorted; links to folders outside are errors (those inside are visited anyway)."""
    files: list[Path] = []
    root = folder.resolve()

    def unreadable(error: OSError) -> None:
        problems.error(Path(error.filename or folder), None, f"cannot be listed: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent)
        files += [here / name for name in sorted(names) if not name.startswith(".")]
        for name in folders:
            link = here / name
            if link.is_symlink() and not link.resolve().is_relative_to(root):
                problems.error(link, None, f"links out of the folder {root}, to {link.resolve()}; copy it there")
    return files
