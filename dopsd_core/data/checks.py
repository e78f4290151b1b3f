"""Checks the images of a dataset: readable, inside the root folder, not a duplicate, and fitting their bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from .buckets import Bucket, cover_box, must_enlarge, nearest_bucket
from .folder import Entry
from .images import ImageError, decode, pixel_digest
from .masks import masks_beside, opacity_of, read_mask, tells_subject
from .problems import Problems

MAX_LOSS = 0.2
"""Share of an image that may be cropped without a warning."""

FAINT = 128
"""An image that is nowhere as opaque as this, of 255, is warned of."""


@dataclass(frozen=True)
class Fit:
    """The size of an entry's image after EXIF rotation, and its bucket.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        bucket: the size that it is trained at.
        mask: the file that says where the subject is: a mask, or the image itself if it is transparent.
        pixels: a digest, equal for images with equal pixels.
    """

    width: int
    height: int
    bucket: Bucket
    mask: Path | None = None
    pixels: str = ""


@dataclass(frozen=True)
class _Looked:
    """A decoded image's (width, height), pixel digest, and least and greatest opacity, 0 to 255."""

    size: tuple[int, int]
    digest: str
    opacity: tuple[int, int]


@dataclass
class ImageChecker:
    """Decodes the images of entries and reports problems with them.

    An image may be the source of many edits: each file is decoded once, and its problems are reported for each entry.

    Attributes:
        root: the folder that must contain all images.
        buckets: the training sizes.
        smaller: those of smaller resolutions, the largest first; an image that one would enlarge is checked at the
            next.
        problems: collects the problems.
        looked: decoded files by real path; a text is the reason why the file is invalid.
        seen: target files by their own digest and those of their sources.
    """

    root: Path
    buckets: Sequence[Bucket]
    problems: Problems
    smaller: Sequence[Sequence[Bucket]] = ()
    looked: dict[Path, _Looked | str] = field(default_factory=dict)
    seen: dict[str, dict[tuple[str, ...], Path]] = field(default_factory=dict)

    def check(self, entry: Entry) -> Fit | None:
        """The size and bucket of an entry, or None after reporting why it cannot be used."""
        target = self._look(entry, entry.image)
        looks = [self._look(entry, path) for path in entry.source_images]
        sources = [source for source in looks if source is not None]
        if target is None or len(sources) < len(looks):
            return None
        if self._is_repeated(entry, target.digest, tuple(source.digest for source in sources)):
            return None
        width, height = target.size
        if entry.declared not in (None, target.size):
            declared = "x".join(map(str, entry.declared or ()))
            message = f"is {width}x{height}, but the row says {declared}: using the file's size"
            self._note("warning", entry, entry.image, message)
        bucket = self._bucket(width, height)
        enlarged = must_enlarge(width, height, bucket)
        if enlarged:
            self._warn_of_size(entry, entry.image, target.size, f"its bucket {bucket}")
        self._warn_of_loss(entry, entry.image, target.size, bucket, "its bucket")
        for path, source in zip(entry.source_images, sources, strict=True):
            if not enlarged and must_enlarge(*source.size, bucket):  # the target's warning is enough
                self._warn_of_size(entry, path, source.size, f"its target's bucket {bucket}")
            self._warn_of_loss(entry, path, source.size, bucket, "its target's bucket")
        return Fit(width, height, bucket, self._mask(entry, target), target.digest)

    def _bucket(self, width: int, height: int) -> Bucket:
        """The bucket at the largest resolution that does not enlarge the image, or at the smallest one."""
        fitting = [nearest_bucket(width, height, buckets) for buckets in (self.buckets, *self.smaller)]
        return next((bucket for bucket in fitting if not must_enlarge(width, height, bucket)), fitting[-1])

    def _look(self, entry: Entry, path: Path) -> _Looked | None:
        real = self._inside(entry, path)
        if real is None:
            return None
        if real not in self.looked:
            try:
                decoded = decode(real)
            except ImageError as error:
                self.looked[real] = str(error)
            else:
                opacity = (255, 255) if decoded.alpha is None else opacity_of(decoded.alpha)
                self.looked[real] = _Looked(decoded.image.size, pixel_digest(decoded.image), opacity)
                if opacity[1] < FAINT:
                    self._note("warning", entry, path, _faint(opacity[1]))
                if decoded.frames > 1:
                    self._note("warning", entry, path, f"animated: only the first of {decoded.frames} frames is used")
                for remark in decoded.remarks:
                    self._note("warning", entry, path, remark)
        found = self.looked[real]
        if isinstance(found, str):
            self._note("error", entry, path, found)
            return None
        return found

    def _mask(self, entry: Entry, target: _Looked) -> Path | None:
        """The file with the mask, or None without one or after reporting what is wrong with it."""
        masks = masks_beside(entry.image)
        if len(masks) > 1:
            names = ", ".join(path.name for path in masks)
            self._note("error", entry, entry.image, f"{len(masks)} masks: {names}; keep one")
        if len(masks) != 1 or self._inside(entry, masks[0]) is None:
            return entry.image if tells_subject(target.opacity) and not masks else None
        try:
            read_mask(masks[0], entry.image)
        except ImageError as error:
            self._note("error", entry, masks[0], str(error))
            return None
        return masks[0]

    def _is_repeated(self, entry: Entry, target: str, sources: tuple[str, ...]) -> bool:
        """Whether the image or edit is a duplicate, or the edit changes nothing. Several sources for one target are
        possible but probably a mistake, so there is a warning."""
        if target in sources:
            self._note("error", entry, entry.image, "the same image as its source: an edit must change something")
            return True
        twins = self.seen.setdefault(target, {})
        if sources in twins:
            what = "edit" if sources else "image"
            message = f"duplicate: the same {what} as {twins[sources]}; remove one, or use repeats"
            self._note("error", entry, entry.image, message)
            return True
        if twins:
            first = next(iter(twins.values()))
            self._note("warning", entry, entry.image, f"the same target as {first}, from another source")
        twins[sources] = entry.image
        return False

    def _inside(self, entry: Entry, path: Path) -> Path | None:
        """The real path of an image if it exists inside the root.

        The message does not reveal whether a path outside the root exists: a JSONL may come from anywhere.
        """
        roots = (Path(os.path.abspath(self.root)), self.root.resolve())
        spelled = Path(os.path.abspath(path))
        leaves = f"is outside of the folder {roots[1]}; move it there, or choose a wider root folder"
        is_inside = any(spelled.is_relative_to(root) for root in roots)
        reason = leaves if is_inside else f"no such file, or it may not be read: it {leaves}"
        try:
            resolved = path.resolve(strict=True) if shares_drive(spelled, roots) else None
        except (OSError, ValueError, RuntimeError) as error:
            resolved = None
            if is_inside:
                reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error}"
        if resolved is not None and resolved.is_relative_to(roots[1]):
            if resolved.is_file():
                return resolved
            reason = "is not a file"
        self._note("error", entry, path, reason)
        return None

    def _warn_of_size(self, entry: Entry, path: Path, size: tuple[int, int], where: str) -> None:
        message = f"is {size[0]}x{size[1]}, smaller than {where}: it would be upsampled"
        self._note("warning", entry, path, message)

    def _warn_of_loss(self, entry: Entry, path: Path, size: tuple[int, int], bucket: Bucket, where: str) -> None:
        width, height = size
        left, top, right, bottom = cover_box(width, height, bucket)
        loss = 1 - (right - left) * (bottom - top) / (width * height)
        if loss > MAX_LOSS:
            message = f"is {width}x{height}: {loss:.0%} is cropped to fit {where} {bucket}"
            self._note("warning", entry, path, message)

    def _note(self, severity: Literal["error", "warning"], entry: Entry, path: Path, message: str) -> None:
        """Reports the row for a JSONL (with the image in the message), or the image for a folder."""
        if entry.caption_line is None:
            self.problems.add(severity, path, None, message)
        else:
            self.problems.add(severity, entry.caption_file, entry.caption_line, f"{path}: {message}")


def _faint(opacity: int) -> str:
    return (
        f"is nowhere more than {opacity / 255:.0%} opaque: it is used on white, very pale, and its transparency does "
        "not tell where the subject is; save it without transparency"
    )


def shares_drive(path: PurePath, roots: Sequence[PurePath]) -> bool:
    """Whether a path is on the drive or network share of one of the roots.

    Only Windows has those, and there accessing a file on a share would sign in to its server.
    """
    return path.drive.casefold() in {root.drive.casefold() for root in roots}
