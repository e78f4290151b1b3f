"""A dataset on disk, of images or of edits, in a folder or in the authors' JSONL; all its problems at once.

    report = read_dataset("photos", pixel_budget=1024 * 1024, multiple=16, trigger="ohwx")
    report.raise_for_errors()
    for pair in report.pairs: ...

Nothing is silently left out or replaced: what cannot be used is an error, what is used but doubtful a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text import printable
from .buckets import Bucket, make_buckets
from .captions import CaptionError, check_text, doubts_of, has_trigger, near_placeholder, put_trigger, remove_trigger
from .checks import Fit, ImageChecker
from .folder import ROW_SUFFIXES, Entry, read_folder
from .jsonl import read_jsonl
from .problems import Problem, Problems
from .repeats import MAX_REPEATS


@dataclass(frozen=True)
class Pair:
    """An image and its captions, one of which is drawn at each visit; or an edit, its sources and its instructions.

    Attributes:
        image_path: the image file; the result of an edit.
        captions: at least one, none empty; `[V]` already replaced by the trigger.
        width, height: size of the upright image in pixels.
        bucket: the size it is trained in.
        repeats: visits per epoch.
        caption_file, caption_line: the file that holds the captions, and the line of a JSONL.
        source_images: the images that an edit starts from, in order, cropped to the bucket of the result; empty for a
            plain image.
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


@dataclass(frozen=True)
class DatasetReport:
    """What is in a dataset and what is wrong with it. `pairs` holds the good ones only."""

    source: Path
    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that forbid training."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that training lives with."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    def raise_for_errors(self) -> None:
        """Raises DatasetError with every error of the dataset in its message, if there is one."""
        if self.errors:
            raise DatasetError(self)

    def describe(self) -> str:
        """The report in words: counts, buckets, then every problem on a line of its own."""
        sources = {source for pair in self.pairs for source in pair.source_images}
        what = "edit pair" if sources else "image"
        lines = [printable(f"{self.source}: {len(self.pairs)} usable {what}{'s' * (len(self.pairs) != 1)}")]
        counts = Counter(pair.bucket for pair in self.pairs)
        lines += [f"  {count:4d} in bucket {bucket}" for bucket, count in sorted(counts.items())]
        repeated = sum(pair.repeats > 1 for pair in self.pairs)
        if repeated:
            lines.append(f"  {repeated:4d} repeated, {sum(pair.repeats for pair in self.pairs)} visits per epoch")
        if sources:
            lines.append(f"  {len(sources):4d} source images, cut to the buckets of their targets")
        varied = sum(len(pair.captions) > 1 for pair in self.pairs)
        if varied:
            lines.append(f"  {varied:4d} with several captions")
        lines += [str(problem) for problem in (*self.errors, *self.warnings)]
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings")
        return "\n".join(lines)


class DatasetError(ValueError):
    """A dataset cannot be trained on; the message lists every error, `report` has the rest."""

    def __init__(self, report: DatasetReport) -> None:
        lines = "\n".join(str(problem) for problem in report.errors)
        super().__init__(printable(f"{len(report.errors)} errors in the dataset {report.source}:\n{lines}"))
        self.report = report

    def __reduce__(self) -> tuple[type[DatasetError], tuple[DatasetReport]]:
        return DatasetError, (self.report,)  # so that it survives the way out of a worker process


def read_dataset(
    source: str | Path,
    *,
    pixel_budget: int,
    multiple: int,
    trigger: str = "",
    repeats: int = 1,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetReport:
    """Reads and checks a whole dataset; every file is decoded once.

    Args:
        source: a folder of images with same-named .txt captions (sub-folders too; one named `10_anything` repeats its
            images 10 times, up to MAX_REPEATS); a folder of edits, target/ being such a folder and source/ holding
            what each edit starts from at the same place; or a .jsonl file with a row per image or per edit.
        pixel_budget: the most pixels of a training image.
        multiple: the sides of a training image are multiples of it.
        trigger: replaces `[V]` in the captions; "" leaves `[V]` there.
        repeats: visits per epoch of each image, up to MAX_REPEATS, multiplied with its own.
        root: the folder that no image may lie outside of; by default the folder, or the folder of the JSONL.
        progress: called with (images done, images in all).

    Raises:
        ValueError: an argument is out of range. Problems of the data never raise: they are in the report.
    """
    if not 1 <= repeats <= MAX_REPEATS:
        raise ValueError(f"repeats ({repeats}) must be from 1 to {MAX_REPEATS}")
    trigger = _checked_trigger(trigger)
    source = Path(source)
    problems = Problems()
    entries = _read_entries(source, problems)
    checker = ImageChecker(
        root=Path(root) if root is not None else (source if source.is_dir() else source.parent),
        buckets=make_buckets(pixel_budget, multiple),
        problems=problems,
    )
    pairs: list[Pair] = []
    for done, entry in enumerate(entries, 1):
        fit = checker.check(entry)
        _warn_of_doubts(entry, trigger, problems)
        if fit is not None and entry.captions:
            pairs.append(_make_pair(entry, fit, trigger, repeats))
        if progress is not None:
            progress(done, len(entries))
    _warn_without_trigger(pairs, trigger, problems)
    if not entries and not any(problem.severity == "error" for problem in problems.found):
        wanted = "put .png, .jpg, .jpeg, .webp or .bmp files with .txt captions there"
        problems.error(source, None, f"no images; {wanted if source.is_dir() else 'the file has no rows'}")
    return DatasetReport(source, tuple(pairs), tuple(problems.found))


def _checked_trigger(trigger: str) -> str:
    try:
        check_text(trigger)
    except CaptionError as error:
        raise ValueError(f"the trigger {trigger!r} cannot be used: {error}") from error
    return trigger.strip()


def _read_entries(source: Path, problems: Problems) -> list[Entry]:
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
    )


def _warn_of_doubts(entry: Entry, trigger: str, problems: Problems) -> None:
    """Warns of what may have been meant otherwise in captions, equal sentences of a row once."""
    doubts = dict.fromkeys(doubt for text in entry.captions for doubt in doubts_of(text, trigger))
    if entry.caption_line is None:
        for doubt in doubts:
            problems.warning(entry.caption_file, entry.text_line + doubt.line - 1, doubt.message)
    else:
        for message in dict.fromkeys(doubt.message for doubt in doubts):
            problems.warning(entry.caption_file, entry.caption_line, message)


def _warn_without_trigger(pairs: Sequence[Pair], trigger: str, problems: Problems) -> None:
    """Warns of captions that do not name the concept, where there is a trigger or some captions say `[V]`; of
    instructions only where there is a trigger, because an edit need not have a name. Near misses have a warning."""

    def lacks(text: str) -> bool:
        return not has_trigger(text, trigger) and near_placeholder(text, trigger) is None

    lacking = [(pair, sum(map(lacks, pair.captions))) for pair in pairs]
    if not trigger and all(pair.source_images or not any(map(has_trigger, pair.captions)) for pair in pairs):
        return
    name = f"the trigger {trigger!r}" if trigger else "[V]"
    for pair, count in lacking:
        if count:
            kind = "instruction" if pair.source_images else "caption"
            which = f"the {kind} lacks" if len(pair.captions) == 1 else f"{count} {kind}s lack"
            problems.warning(pair.caption_file, pair.caption_line or 1, f"{which} {name}: it teaches the words it has")


@dataclass(frozen=True)
class Example:
    """One image as the trainer draws it: indices into the list of conditions.

    Attributes:
        variants: a condition per caption; one is drawn at each visit. Indices may repeat.
        dropped: the condition with the empty caption, where caption dropout is wanted.
        repeats: visits per epoch.
    """

    variants: tuple[int, ...]
    dropped: int | None = None
    repeats: int = 1


@dataclass(frozen=True)
class EncodingPlan:
    """What must be encoded before training: (pair, caption) requests, and how examples draw from them.

    `anchors` are the captions without the concept's name, for the prior anchor; captions that do not name it have none:
    held at the base and taught the concept, one text would pull both ways. Nor have edits: an instruction without its
    image is no prompt.
    """

    requests: tuple[tuple[Pair, str], ...]
    examples: tuple[Example, ...]
    anchors: tuple[str, ...]


def plan_encoding(pairs: Sequence[Pair], *, trigger: str = "", caption_dropout: bool = False) -> EncodingPlan:
    """Each image with each of its different captions once, and with the empty one for dropout."""
    requests: list[tuple[Pair, str]] = []
    examples: list[Example] = []
    for pair in pairs:
        texts = list(dict.fromkeys(pair.captions)) + [""] * caption_dropout
        index = {text: len(requests) + offset for offset, text in enumerate(texts)}
        requests += [(pair, text) for text in texts]
        examples.append(Example(tuple(index[text] for text in pair.captions), index.get(""), pair.repeats))
    plain = [pair for pair in pairs if not pair.source_images]
    named = [caption for pair in plain for caption in pair.captions if has_trigger(caption, trigger)]
    anchors = dict.fromkeys(re.sub(r"\s+", " ", remove_trigger(caption, trigger)) for caption in named)
    return EncodingPlan(tuple(requests), tuple(examples), tuple(text for text in anchors if text))
