"""A data set on disk: a folder of pictures with captions beside them, or the authors' JSONL; all its problems at once.

    report = read_dataset("photos", pixel_budget=1024 * 1024, multiple=16, trigger="ohwx")
    report.raise_for_errors()
    for pair in report.pairs: ...

Nothing is silently left out or replaced: what cannot be used is an error, what is used but doubtful a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .buckets import Bucket, cover_box, make_buckets, must_enlarge, nearest_bucket
from .captions import has_trigger, put_trigger, remove_trigger
from .dataset_files import Entry, Problem, Problems, read_folder, read_jsonl
from .images import ImageError, decode, pixel_digest

MAX_LOSS = 0.2
"""The share of a picture that may be cut away without a warning."""


@dataclass(frozen=True)
class Pair:
    """A picture and its captions, one of which is drawn at each visit; or an edit, its sources and its instructions.

    Attributes:
        image_path: the picture file; the result of an edit.
        captions: at least one, none empty; `[V]` already replaced by the trigger.
        width, height: size of the upright picture in pixels.
        bucket: the size it is trained in.
        repeats: visits per epoch.
        source, line: the file that the captions stand in, and the line of a JSONL.
        sources: the pictures that an edit starts from, in order, cropped to the bucket of the result; none for a plain
            picture.
    """

    image_path: Path
    captions: tuple[str, ...]
    width: int
    height: int
    bucket: Bucket
    repeats: int
    source: Path
    line: int | None = None
    sources: tuple[Path, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """What is in a data set and what is wrong with it. `pairs` holds the good ones only."""

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
        """Raises DatasetError with every error of the data set in its message, if there is one."""
        if self.errors:
            raise DatasetError(self)

    def describe(self) -> str:
        """The report in words: counts, buckets, then every problem on a line of its own."""
        lines = [f"{self.source}: {len(self.pairs)} usable picture{'s' * (len(self.pairs) != 1)}"]
        counts = Counter(pair.bucket for pair in self.pairs)
        lines += [f"  {count:4d} in bucket {bucket}" for bucket, count in sorted(counts.items())]
        repeated = sum(pair.repeats > 1 for pair in self.pairs)
        if repeated:
            lines.append(f"  {repeated:4d} repeated, {sum(pair.repeats for pair in self.pairs)} visits per epoch")
        varied = sum(len(pair.captions) > 1 for pair in self.pairs)
        if varied:
            lines.append(f"  {varied:4d} with several captions")
        lines += [str(problem) for problem in (*self.errors, *self.warnings)]
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings")
        return "\n".join(lines)


class DatasetError(ValueError):
    """A data set cannot be trained on; the message lists every error, `report` has the rest."""

    def __init__(self, report: DatasetReport) -> None:
        lines = "\n".join(str(problem) for problem in report.errors)
        super().__init__(f"{len(report.errors)} errors in the data set {report.source}:\n{lines}")
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
    """Reads and checks a whole data set; every picture is decoded once.

    Args:
        source: a folder of pictures with same-named .txt captions (sub-folders too; one named `10_anything` repeats its
            pictures 10 times), or a .jsonl file with a row per picture.
        pixel_budget: the most pixels of a training picture.
        multiple: the sides of a training picture are multiples of it.
        trigger: replaces `[V]` in the captions; "" leaves `[V]` there.
        repeats: visits per epoch of each picture, multiplied with its own.
        root: the folder that no picture may lie outside of; by default the folder, or the folder of the JSONL.
        progress: called with (pictures done, pictures in all).

    Raises:
        ValueError: an argument is out of range. Problems of the data never raise: they are in the report.
    """
    if repeats < 1:
        raise ValueError(f"repeats ({repeats}) must be at least 1")
    source = Path(source)
    problems = Problems()
    entries = _read_entries(source, problems)
    checker = _PictureChecker(
        root=Path(root) if root is not None else (source if source.is_dir() else source.parent),
        buckets=make_buckets(pixel_budget, multiple),
        trigger=trigger.strip(),
        repeats=repeats,
        problems=problems,
    )
    pairs: list[Pair] = []
    for done, entry in enumerate(entries, 1):
        pair = checker.check(entry)
        if pair is not None:
            pairs.append(pair)
        if progress is not None:
            progress(done, len(entries))
    checker.warn_without_trigger(pairs)
    if not entries and not any(problem.severity == "error" for problem in problems.found):
        problems.error(source, None, "no pictures; put .png, .jpg, .jpeg, .webp or .bmp files with .txt captions there")
    return DatasetReport(source, tuple(pairs), tuple(problems.found))


def _read_entries(source: Path, problems: Problems) -> list[Entry]:
    if source.is_dir():
        return read_folder(source, problems)
    if source.suffix.lower() in (".jsonl", ".ndjson") and source.is_file():
        return read_jsonl(source, problems)
    what = "a file, but not a .jsonl one" if source.is_file() else "not there"
    problems.error(source, None, f"is {what}; give a folder of pictures and captions, or a .jsonl file")
    return []


@dataclass
class _PictureChecker:
    """Turns entries into pairs, remembering the pictures seen."""

    root: Path
    buckets: Sequence[Bucket]
    trigger: str
    repeats: int
    problems: Problems
    seen: dict[str, Path] = field(default_factory=dict)

    def check(self, entry: Entry) -> Pair | None:
        """The pair of an entry, or None after noting why there is none."""
        size = self._check_picture(entry)
        if size is None or not entry.captions:
            return None
        width, height = size
        bucket = nearest_bucket(width, height, self.buckets)
        self._warn_of_fit(entry, width, height, bucket)
        captions = tuple(put_trigger(caption, self.trigger) for caption in entry.captions)
        repeats = entry.repeats * self.repeats
        return Pair(entry.image, captions, width, height, bucket, repeats, entry.source, entry.line)

    def warn_without_trigger(self, pairs: Sequence[Pair]) -> None:
        """Warns of captions that do not name the concept, where there is a trigger or some captions say `[V]`."""
        lacking = [(pair, sum(not has_trigger(text, self.trigger) for text in pair.captions)) for pair in pairs]
        if not self.trigger and all(count == len(pair.captions) for pair, count in lacking):
            return
        name = f"the trigger {self.trigger!r}" if self.trigger else "[V]"
        for pair, count in lacking:
            if count:
                which = "the caption lacks" if len(pair.captions) == 1 else f"{count} captions lack"
                self.problems.warning(pair.source, pair.line or 1, f"{which} {name}: it teaches the words it has")

    def _check_picture(self, entry: Entry) -> tuple[int, int] | None:
        resolved = self._inside(entry)
        if resolved is None:
            return None
        try:
            image, frames = decode(resolved)
        except ImageError as error:
            self._note("error", entry, str(error))
            return None
        twin = self.seen.setdefault(pixel_digest(image), entry.image)
        if twin is not entry.image:
            self._note("error", entry, f"duplicate: the same picture as {twin}; remove one, or use repeats")
            return None
        if frames > 1:
            self._note("warning", entry, f"animated: only the first of {frames} frames is used")
        if entry.declared not in (None, image.size):
            declared = "x".join(map(str, entry.declared or ()))
            self._note("warning", entry, f"is {image.width}x{image.height}, the row says {declared}: the file counts")
        return image.size

    def _inside(self, entry: Entry) -> Path | None:
        """The real path of the picture if it exists inside the root."""
        try:
            resolved = entry.image.resolve(strict=True)
            root = self.root.resolve(strict=True)
        except FileNotFoundError:
            self._note("error", entry, "no such file")
        except (OSError, ValueError, RuntimeError) as error:
            self._note("error", entry, f"cannot be opened: {error}")
        else:
            if not resolved.is_relative_to(root):
                self._note("error", entry, f"leaves the folder {root}; move it there, or choose a wider root folder")
            elif not resolved.is_file():
                self._note("error", entry, "is no file")
            else:
                return resolved
        return None

    def _warn_of_fit(self, entry: Entry, width: int, height: int, bucket: Bucket) -> None:
        if must_enlarge(width, height, bucket):
            self._note("warning", entry, f"is {width}x{height}, smaller than its bucket {bucket}: it is enlarged")
        left, top, right, bottom = cover_box(width, height, bucket)
        loss = 1 - (right - left) * (bottom - top) / (width * height)
        if loss > MAX_LOSS:
            self._note("warning", entry, f"is {width}x{height}: {loss:.0%} is cut away to fit its bucket {bucket}")

    def _note(self, severity: Literal["error", "warning"], entry: Entry, message: str) -> None:
        """Names the row for a JSONL (with the picture in the message), the picture itself for a folder."""
        if entry.line is None:
            self.problems.add(severity, entry.image, None, message)
        else:
            self.problems.add(severity, entry.source, entry.line, f"{entry.image}: {message}")


@dataclass(frozen=True)
class Example:
    """One picture as the trainer draws it: indices into the list of conditions.

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
    held at the base and taught the concept, one text would pull both ways.
    """

    requests: tuple[tuple[Pair, str], ...]
    examples: tuple[Example, ...]
    anchors: tuple[str, ...]


def plan_encoding(pairs: Sequence[Pair], *, trigger: str = "", caption_dropout: bool = False) -> EncodingPlan:
    """Each picture with each of its different captions once, and with the empty one for dropout."""
    requests: list[tuple[Pair, str]] = []
    examples: list[Example] = []
    for pair in pairs:
        texts = list(dict.fromkeys(pair.captions)) + [""] * caption_dropout
        index = {text: len(requests) + offset for offset, text in enumerate(texts)}
        requests += [(pair, text) for text in texts]
        examples.append(Example(tuple(index[text] for text in pair.captions), index.get(""), pair.repeats))
    named = [caption for pair in pairs for caption in pair.captions if has_trigger(caption, trigger)]
    anchors = dict.fromkeys(re.sub(r"\s+", " ", remove_trigger(caption, trigger)) for caption in named)
    return EncodingPlan(tuple(requests), tuple(examples), tuple(text for text in anchors if text))
