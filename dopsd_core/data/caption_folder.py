"""Writes the missing captions of a folder of images, and lists all images with their captions to look through.

A caption that is there is never changed, however bad it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..files.atomic import write_new
from ..text import printable
from .caption_files import CAPTION_SUFFIX
from .captioning import Ask, CaptionOptions
from .captions import PLACEHOLDER, CaptionError, has_trigger, with_placeholder
from .folder import Entry, edit_folders, read_folder
from .identity_words import Shared, shared_words, words_of_concept
from .images import ImageError, read_image, to_tensor
from .problems import Problems

State = Literal["written", "kept", "missing", "failed"]
"""written: by this call. kept: it was there. missing: there is none. failed: nothing could be written or read."""

_STATE_HELP = {"written": "new", "kept": "already there", "missing": "without caption", "failed": "left alone"}


@dataclass(frozen=True)
class Captioned:
    """An image and its caption.

    Attributes:
        image: the image file.
        caption: "" without one.
        state: whether the caption was written now, was there, or is missing.
        remarks: what to look at, one line each.
        trigger: the word of its concept, from a trigger.txt.
    """

    image: Path
    caption: str
    state: State
    remarks: tuple[str, ...] = ()
    trigger: str = ""


@dataclass(frozen=True)
class CaptionList:
    """All images of a folder with their captions.

    Attributes:
        folder: the folder.
        items: in the order of the files' names.
        shared: the words that nearly all captions have.
    """

    folder: Path
    items: tuple[Captioned, ...]
    shared: tuple[Shared, ...]

    def describe(self) -> str:
        """Counts, what the captions share, then two lines or more per image."""
        counts = Counter(item.state for item in self.items)
        parts = [f"{counts[state]} {_STATE_HELP[state]}" for state in _STATE_HELP if counts[state]]
        lines = [f"{self.folder}: {len(self.items)} image{'s' * (len(self.items) != 1)}, {', '.join(parts)}"]
        lines += self.remarks()
        for item in self.items:
            lines.append(f"{self._name(item)} ({item.state}): {item.caption}".rstrip(": "))
        return printable("\n".join(lines))

    def remarks(self) -> list[str]:
        """Everything to look at, one line each: about all captions, then by image."""
        found = [f"warning: {word}" for word in self.shared if not word.is_class]
        found += [f"note: {word}" for word in self.shared if word.is_class]
        for item in self.items:
            kind = "error" if item.state == "failed" else "warning"
            found += [f"{kind}: {self._name(item)}: {remark}" for remark in item.remarks]
        return [printable(line) for line in found]

    def tiles(self) -> list[tuple[Path, str]]:
        """(image, its state and caption) for a sheet of thumbnails."""
        return [(item.image, f"{item.state}: {item.caption}".rstrip(": ")) for item in self.items]

    def _name(self, item: Captioned) -> str:
        return item.image.relative_to(self.folder).as_posix()


def caption_folder(
    folder: Path,
    options: CaptionOptions,
    ask: Ask | None,
    *,
    root: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionList:
    """Writes a .txt caption beside each image that has none, one after another, and lists all images.

    Args:
        folder: images, in subfolders too; without masks of others.
        options: what the captions say.
        ask: the model that sees the images; None to write nothing.
        root: the folder that must contain all images; by default `folder`.
        progress: called with (captions done, captions to write); what it raises stops between two images.

    Raises:
        ValueError: it is no folder, has no images, or contains edits, whose instructions no model can see.
        DiskError: a caption cannot be written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: captions are written beside images, so give the images' folder")
    if edit_folders(folder):
        raise ValueError(f"{folder} contains edits: write their instructions yourself, an image does not show them")
    problems = Problems()
    entries = read_folder(folder, problems)
    if not entries:
        raise ValueError(f"{folder} has no images: put .png, .jpg, .jpeg, .webp or .bmp files there")
    reasons = {problem.file: problem.message for problem in problems.found if problem.severity == "error"}
    items = [replace(_as_found(entry, reasons), trigger=entry.trigger) for entry in entries]
    writer = _Writer(options, ask, (root or folder).resolve())
    places = [i for i, item in enumerate(items) if item.state == "missing"] if ask else []
    for done, place in enumerate(places):
        progress(done, len(places))
        items[place] = writer.write(items[place])
    if places:
        progress(len(places), len(places))
    return _checked(folder, items, options)


def _as_found(entry: Entry, reasons: dict[Path, str]) -> Captioned:
    """An image as it is in the folder."""
    if entry.captions:
        return Captioned(entry.image, entry.captions[0], "kept")
    if entry.is_uncaptioned and not entry.near_miss:
        return Captioned(entry.image, "", "missing")
    reason = entry.near_miss or reasons.get(entry.image) or reasons.get(entry.caption_file, "its caption is not valid")
    return Captioned(entry.image, "", "failed", (f"no caption was written: {reason}",))


@dataclass(frozen=True)
class _Writer:
    """Asks for captions and writes them."""

    options: CaptionOptions
    ask: Ask | None
    root: Path

    def write(self, missing: Captioned) -> Captioned:
        """Writes the caption of an image without one."""
        if self.ask is None:
            return missing
        image, options = missing.image, _options_of(missing, self.options)
        try:
            if not image.resolve().is_relative_to(self.root):
                raise ImageError("links out of the folder: copy it there")
            answer = self.ask(to_tensor(read_image(image)), options.question())
            caption, remarks = options.caption(answer)
        except (ImageError, CaptionError) as error:
            return replace(missing, state="failed", remarks=(f"no caption was written: {error}",))
        file = image.with_suffix(CAPTION_SUFFIX)
        if not write_new(file, f"{caption}\n".encode()):
            reason = f"no caption was written: {file.name} is there meanwhile, or belongs to another image of that name"
            return replace(missing, state="failed", remarks=(reason,))
        return replace(missing, caption=caption, state="written", remarks=remarks)


def _options_of(item: Captioned, options: CaptionOptions) -> CaptionOptions:
    """The options with the trigger of the image's own folder, if it has one."""
    return options.replace(trigger=item.trigger) if item.trigger else options


def _checked(folder: Path, items: Sequence[Captioned], options: CaptionOptions) -> CaptionList:
    """The list with remarks about what the captions say."""
    captions = [with_placeholder(item.caption, item.trigger) for item in items if item.caption]
    shared = shared_words(captions, options)
    checked = [replace(item, remarks=(*item.remarks, *_remarks(item, options, shared))) for item in items]
    return CaptionList(folder, tuple(checked), shared)


def _remarks(item: Captioned, options: CaptionOptions, shared: Sequence[Shared]) -> list[str]:
    caption, found = item.caption, []
    if not caption:
        return []
    options = _options_of(item, options)
    if not has_trigger(caption, options.trigger):
        found.append(f"the caption lacks {PLACEHOLDER}: the concept is learned for its ordinary words")
    said = words_of_concept(caption, options, shared)
    if said:
        words = ", ".join(f"'{word}'" for word in said)
        what = "the style" if options.aim == "style" else "the concept itself"
        found.append(f"says {words} of {what}: delete what {PLACEHOLDER} should learn")
    return found
