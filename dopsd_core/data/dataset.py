"""Reads a dataset of images or edits from a folder or a JSONL file and reports all problems at once.

    report = read_dataset("photos", pixel_budget=1024 * 1024, multiple=16, trigger="ohwx")
    report.raise_for_errors()
    for pair in report.pairs: ...

Nothing is skipped or replaced silently: unusable items are errors, doubtful ones are warnings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text import printable
from .buckets import Bucket, make_buckets
from .captions import (
    doubts_of,
    has_trigger,
    near_placeholder,
    put_trigger,
)
from .checks import Fit, ImageChecker
from .folder import ROW_SUFFIXES, Entry, read_folder
from .jsonl import read_jsonl
from .problems import Problem, Problems
from .repeats import MAX_REPEATS
from .triggers import concepts_of, given_trigger, require_own_triggers, warn_of_collisions, warn_of_unused

ORDINARY_WORDS = "the concept is learned for its ordinary words"
"""How the warning about a caption without the concept's name ends."""


@dataclass(frozen=True)
class Pair:
    """An image with its captions, or an edit with its source images and instructions. One caption is sampled per visit.

    Attributes:
        image_path: the image file; the target of an edit.
        captions: at least one, none empty; `[V]` is already replaced by the trigger.
        width: width in pixels, after EXIF rotation.
        height: height in pixels, after EXIF rotation.
        bucket: the size that it is trained at.
        repeats: visits per epoch.
        caption_file: the file that contains the captions.
        caption_line: the line of a JSONL file; None for a caption file.
        source_images: the source images of an edit, in order, cropped to the bucket of the target; empty for an image.
        mask: the file that says where the subject is: a mask, or the image itself if it is transparent; or None.
        trigger: the word of its concept, which `[V]` was replaced by; "" if `[V]` is still there.
        pixels: a digest of the image, equal for equal pixels; "" if it is not known.
    """

    image_path: Path
    captions: tuple[str, ...]
    width: int
    height: int
    bucket: Bucket
    repeats: int
    caption_file: Path
    caption_line: int | None = None
    source_images: tuple[Path, ...] = ()
    mask: Path | None = None
    trigger: str = ""
    pixels: str = ""


@dataclass(frozen=True)
class DatasetReport:
    """The contents of a dataset and its problems.

    Attributes:
        source: the folder or JSONL file.
        pairs: the usable pairs only.
        problems: errors and warnings, in the order of the data.
    """

    source: Path
    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that prevent training."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that do not prevent training."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    @property
    def concepts(self) -> tuple[str, ...]:
        """The triggers of the usable pairs, in order."""
        return concepts_of(pair.trigger for pair in self.pairs)

    def trigger_in_prompts(self, given: str) -> str:
        """The word that `[V]` stands for in prompts: the given one if images have it, else that of the only concept, or
        ""."""
        word, concepts = given.strip(), self.concepts
        if word and (not concepts or word.casefold() in map(str.casefold, concepts)):
            return word
        return concepts[0] if len(concepts) == 1 else ""

    def raise_for_errors(self) -> None:
        """Raises DatasetError with all errors in its message, if there are any."""
        if self.errors:
            raise DatasetError(self)

    def describe(self) -> str:
        """The report as text: counts, buckets, then one line per problem."""
        sources = {source for pair in self.pairs for source in pair.source_images}
        what = "edit pair" if sources else "image"
        lines = [printable(f"{self.source}: {len(self.pairs)} usable {what}{'s' * (len(self.pairs) != 1)}")]
        counts = Counter(pair.bucket for pair in self.pairs)
        lines += [f"  {count:4d} in bucket {bucket}" for bucket, count in sorted(counts.items())]
        repeated = sum(pair.repeats > 1 for pair in self.pairs)
        if repeated:
            lines.append(f"  {repeated:4d} repeated, {sum(pair.repeats for pair in self.pairs)} visits per epoch")
        if sources:
            lines.append(f"  {len(sources):4d} source images, cropped to the buckets of their targets")
        masked = sum(pair.mask not in (None, pair.image_path) for pair in self.pairs)
        if masked:
            lines.append(f"  {masked:4d} with a mask")
        if len(self.concepts) > 1:
            named = Counter(pair.trigger.casefold() for pair in self.pairs)
            lines += [printable(f"  {named[word.casefold()]:4d} of the concept {word}") for word in self.concepts]
        varied = sum(len(pair.captions) > 1 for pair in self.pairs)
        if varied:
            lines.append(f"  {varied:4d} with several captions")
        lines += [str(problem) for problem in (*self.errors, *self.warnings)]
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings")
        return "\n".join(lines)


class DatasetError(ValueError):
    """Raised if a dataset has errors; the message lists all of them, `report` contains the rest."""

    def __init__(self, report: DatasetReport) -> None:
        lines = "\n".join(str(problem) for problem in report.errors)
        super().__init__(printable(f"{len(report.errors)} errors in the dataset {report.source}:\n{lines}"))
        self.report = report

    def __reduce__(self) -> tuple[type[DatasetError], tuple[DatasetReport]]:
        return DatasetError, (self.report,)  # so that it can be pickled by a worker process


def read_dataset(
    source: str | Path,
    *,
    pixel_budget: int,
    multiple: int,
    trigger: str = "",
    repeats: int = 1,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    smaller_budgets: Sequence[int] = (),
) -> DatasetReport:
    """Reads and checks a dataset; every file is decoded once.

    Args:
        source: a folder of images with .txt captions of the same name (subfolders too; one named `10_anything` repeats
            its images 10 times, up to MAX_REPEATS); a folder of edits with such a folder target/ and the source images
            at the same paths in source/; or a .jsonl file with one row per image or edit. a.mask.png is the mask of
            a.png (`masks.py`), a trigger.txt has the trigger of a folder's images (`triggers.py`).
        pixel_budget: maximum number of pixels of a training image.
        multiple: the sides of a training image are multiples of it.
        trigger: replaces `[V]` in the captions of images without their own; "" keeps `[V]`.
        repeats: visits per epoch of each image, up to MAX_REPEATS, multiplied by its own.
        root: the folder that must contain all images; by default the folder, or the folder of the JSONL file.
        progress: called with (images done, total images).
        smaller_budgets: those of smaller resolutions, by size: an image has the largest that does not enlarge it.

    Raises:
        ValueError: an argument is out of range. Problems of the data do not raise: they are in the report.
    """
    if not 1 <= repeats <= MAX_REPEATS:
        raise ValueError(f"repeats ({repeats}) must be from 1 to {MAX_REPEATS}")
    trigger = given_trigger(trigger)
    source = Path(source)
    problems = Problems()
    entries = read_entries(source, problems)
    checker = ImageChecker(
        root=Path(root) if root is not None else (source if source.is_dir() else source.parent),
        buckets=make_buckets(pixel_budget, multiple),
        problems=problems,
        smaller=[make_buckets(budget, multiple) for budget in smaller_budgets],
    )
    pairs = check_entries(entries, checker, trigger, repeats, progress)
    warn_of_unused(trigger, [pair.trigger for pair in pairs], source, problems)
    warn_of_collisions(((p.trigger, p.caption_file, p.caption_line, p.captions) for p in pairs), problems)
    if not entries and not any(problem.severity == "error" for problem in problems.found):
        wanted = "put .png, .jpg, .jpeg, .webp or .bmp files with .txt captions there"
        problems.error(source, None, f"no images; {wanted if source.is_dir() else 'the file has no rows'}")
    return DatasetReport(source, tuple(pairs), tuple(problems.found))


def check_entries(
    entries: Sequence[Entry],
    checker: ImageChecker,
    trigger: str = "",
    repeats: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """The usable pairs of the entries; the checker's `problems` gets everything else. Arguments as of `read_dataset`.

    The trigger must come from `given_trigger`.
    """
    pairs: list[Pair] = []
    for done, entry in enumerate(entries, 1):
        fit = checker.check(entry)
        own = entry.trigger or trigger
        _warn_of_doubts(entry, own, checker.problems)
        if fit is not None and entry.captions:
            pairs.append(_make_pair(entry, fit, own, repeats))
        if progress is not None:
            progress(done, len(entries))
    _warn_without_trigger(pairs, checker.problems)
    require_own_triggers(((p.trigger, p.caption_file, p.caption_line, p.captions) for p in pairs), checker.problems)
    return pairs


def read_entries(source: Path, problems: Problems) -> list[Entry]:
    """The images of a folder or JSONL file with their captions, in order; the images are not opened."""
    if source.is_dir():
        return read_folder(source, problems)
    if source.suffix.lower() in ROW_SUFFIXES and source.is_file():
        return read_jsonl(source, problems)
    what = "a file, but not a .jsonl one" if source.is_file() else "not there"
    problems.error(source, None, f"is {what}; give a folder of images and captions, or a .jsonl file")
    return []


def _make_pair(entry: Entry, fit: Fit, trigger: str, repeats: int) -> Pair:
    return Pair(
        image_path=entry.image,
        captions=tuple(put_trigger(caption, trigger) for caption in entry.captions),
        width=fit.width,
        height=fit.height,
        bucket=fit.bucket,
        repeats=entry.repeats * repeats,
        caption_file=entry.caption_file,
        caption_line=entry.caption_line,
        source_images=entry.source_images,
        mask=fit.mask,
        trigger=trigger,
        pixels=fit.pixels,
    )


def _warn_of_doubts(entry: Entry, trigger: str, problems: Problems) -> None:
    """Adds the warnings about captions, equal ones of a row once."""
    doubts = dict.fromkeys(doubt for text in entry.captions for doubt in doubts_of(text, trigger))
    if entry.caption_line is None:
        for doubt in doubts:
            problems.warning(entry.caption_file, entry.text_line + doubt.line - 1, doubt.message)
    else:
        for message in dict.fromkeys(doubt.message for doubt in doubts):
            problems.warning(entry.caption_file, entry.caption_line, message)


def _warn_without_trigger(pairs: Sequence[Pair], problems: Problems) -> None:
    """Warns of captions without the concept's name, if there is a trigger or some captions contain `[V]`; of
    instructions only if there is a trigger, because an edit needs no name. Near misses have their own warning."""

    def lacks(text: str, trigger: str) -> bool:
        return not has_trigger(text, trigger) and near_placeholder(text, trigger) is None

    has_names = any(not pair.source_images and any(map(has_trigger, pair.captions)) for pair in pairs)
    for pair in pairs:
        count = sum(lacks(caption, pair.trigger) for caption in pair.captions)
        if count and (pair.trigger or has_names):
            name = f"the trigger {pair.trigger!r}" if pair.trigger else "[V]"
            kind = "instruction" if pair.source_images else "caption"
            which = f"the {kind} lacks" if len(pair.captions) == 1 else f"{count} {kind}s lack"
            message = f"{which} {name}: {ORDINARY_WORDS}"
            problems.warning(pair.caption_file, pair.caption_line or 1, message)
