"""The images of a dataset, opened: whether each can be read, lies where it may, is new, and fits its bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from .buckets import Bucket, cover_box, must_enlarge, nearest_bucket
from .folder import Entry
from .images import ImageError, decode, pixel_digest
from .problems import Problems

MAX_LOSS = 0.2
"""The share of an image that may be cut away without a warning."""


@dataclass(frozen=True)
class Fit:
    """The size of an entry's upright image in pixels, and the bucket it is trained in."""

    width: int
    height: int
    bucket: Bucket


@dataclass(frozen=True)
class _Looked:
    """What is kept of an image after a look at it: (width, height) and its digest."""

    size: tuple[int, int]
    digest: str


@dataclass
class ImageChecker:
    """Decodes the images of entries and notes what is wrong with them.

    An image may be the source of many edits: each file is decoded once, and its faults are reported for each entry.
    """

    root: Path
    buckets: Sequence[Bucket]
    problems: Problems
    looked: dict[Path, _Looked | str] = field(default_factory=dict)
    """By real path; a text says why the file cannot be used."""
    seen: dict[str, dict[tuple[str, ...], Path]] = field(default_factory=dict)
    """Target files by their own digest and those of their sources."""

    def check(self, entry: Entry) -> Fit | None:
        """How an entry is trained, or None after noting why it cannot be."""
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
            self._note("warning", entry, entry.image, f"is {width}x{height}, the row says {declared}: the file counts")
        bucket = nearest_bucket(width, height, self.buckets)
        enlarged = must_enlarge(width, height, bucket)
        if enlarged:
            self._warn_of_size(entry, entry.image, target.size, f"its bucket {bucket}")
        self._warn_of_loss(entry, entry.image, target.size, bucket, "its bucket")
        for path, source in zip(entry.source_images, sources, strict=True):
            if not enlarged and must_enlarge(*source.size, bucket):  # as small as its target is no news
                self._warn_of_size(entry, path, source.size, f"its target's bucket {bucket}")
            self._warn_of_loss(entry, path, source.size, bucket, "its target's bucket")
        return Fit(width, height, bucket)

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
                self.looked[real] = _Looked(decoded.image.size, pixel_digest(decoded.image))
                if decoded.frames > 1:
                    self._note("warning", entry, path, f"animated: only the first of {decoded.frames} frames is used")
                for remark in decoded.remarks:
                    self._note("warning", entry, path, remark)
        found = self.looked[real]
        if isinstance(found, str):
            self._note("error", entry, path, found)
            return None
        return found

    def _is_repeated(self, entry: Entry, target: str, sources: tuple[str, ...]) -> bool:
        """Whether the same image or edit was there before, or the edit changes nothing. One target may be the result
        of several sources, but hardly by intent."""
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

        Of what is spelled as if outside nobody learns whether it exists: a JSONL may come from anywhere.
        """
        roots = (Path(os.path.abspath(self.root)), self.root.resolve())
        spelled = Path(os.path.abspath(path))
        leaves = f"leaves the folder {roots[1]}; move it there, or choose a wider root folder"
        is_inside = any(spelled.is_relative_to(root) for root in roots)
        reason = leaves if is_inside else f"no such file that may be read: it {leaves}"
        try:
            resolved = path.resolve(strict=True) if shares_drive(spelled, roots) else None
        except (OSError, ValueError, RuntimeError) as error:
            resolved = None
            if is_inside:
                reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error}"
        if resolved is not None and resolved.is_relative_to(roots[1]):
            if resolved.is_file():
                return resolved
            reason = "is no file"
        self._note("error", entry, path, reason)
        return None

    def _warn_of_size(self, entry: Entry, path: Path, size: tuple[int, int], where: str) -> None:
        message = f"is {size[0]}x{size[1]}, smaller than {where}: it is enlarged"
        self._note("warning", entry, path, message)

    def _warn_of_loss(self, entry: Entry, path: Path, size: tuple[int, int], bucket: Bucket, where: str) -> None:
        width, height = size
        left, top, right, bottom = cover_box(width, height, bucket)
        loss = 1 - (right - left) * (bottom - top) / (width * height)
        if loss > MAX_LOSS:
            message = f"is {width}x{height}: {loss:.0%} is cut away to fit {where} {bucket}"
            self._note("warning", entry, path, message)

    def _note(self, severity: Literal["error", "warning"], entry: Entry, path: Path, message: str) -> None:
        """Names the row for a JSONL (with the image in the message), the image itself for a folder."""
        if entry.caption_line is None:
            self.problems.add(severity, path, None, message)
        else:
            self.problems.add(severity, entry.caption_file, entry.caption_line, f"{path}: {message}")


def shares_drive(path: PurePath, roots: Sequence[PurePath]) -> bool:
    """Whether a path is on the drive or network share of one of the roots.

    Only Windows has those, and there a mere look at a file on a share would sign in to its server.
    """
    return path.drive.casefold() in {root.drive.casefold() for root in roots}
