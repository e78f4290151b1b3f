"""The command encode: writes the conditions of a dataset as shards, in one process or several."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..conditioning.teachers import TeacherView
from ..data.buckets import Bucket, make_buckets
from ..data.captions import check_prompts, put_trigger
from ..data.checks import ImageChecker
from ..data.dataset import Pair, check_entries
from ..data.problems import Problem, Problems
from ..data.sources import Chunk, Columns, Source, open_source
from ..data.triggers import concepts_of, given_trigger
from ..files.disk import require_writable, writing
from ..files.lock import FolderLock
from ..shards.encode_images import encode_images
from ..shards.encoding import Encoding
from ..shards.finish import begin, finish
from ..shards.index import shard_name
from ..shards.rows import ShardRows
from ..shards.writer import read_rows, write_shard
from ..text import printable
from ..training.world import Peers
from .accelerate_world import joined_world
from .chosen import family_of, view_for
from .datasets import side_of
from .hosts.model import HostModel, device_of, load_model, sees_images
from .model_options import ModelOptions
from .texts import say, warn

_LISTED = 100
"""Problems that are listed; the rest is counted."""


def run_encode(args: argparse.Namespace) -> int:
    """Encodes what is missing, then writes the index.

    Raises:
        ValueError: options, dataset and model do not fit together, or the dataset has errors.
        OSError: files are missing, cannot be downloaded or cannot be written.
        FolderInUse: another process encodes into the folder.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    options = ModelOptions.of(args)
    with joined_world(device_of(options).type == "cpu") as world, closing(_Lock(args.output)) as lock:
        peers = Peers(world)
        if not peers.is_first:
            logging.getLogger("dopsd").setLevel(logging.ERROR)
        with peers.ending_together():
            work = _work(args, options)
            peers.require_equal({"the dataset": work.source.digest, "the settings": work.encoding.digest()})
            peers.first(lambda: _begin(work, lock))
        with _ended_by_sigterm():
            found = work.encode(peers)  # an error here ends this process, and its launcher the others
        with peers.ending_together():
            every = peers.all(lambda: found)
            done = peers.first(lambda: _end(work, every))
        if peers.is_first:
            say(done)
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the `with` block SIGTERM, which cluster managers send, is an exception, so that files are cleaned up."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work(args: argparse.Namespace, options: ModelOptions) -> _Work:
    family = family_of(options)
    columns = Columns(args.split, args.subset, args.revision, args.image_column, args.caption_column)
    source = open_source(
        args.dataset, args.shard_size, args.root, columns if columns != Columns() else None
    )  # fmt: skip
    given = given_trigger(args.trigger)
    trigger = _trigger_of(source, given)
    heldout = put_trigger(args.heldout_caption or "", trigger)
    remarks = check_prompts([heldout], "held-out caption", trigger) if heldout else []
    if given and trigger != given:
        remarks.append(f"the trigger {given!r} is not used: all images have their own ({trigger})")
    if heldout and any(put_trigger(text, trigger) == heldout for text, _ in source.known_captions()):
        raise ValueError(f"the held-out caption {heldout!r} is in the dataset; use one that is not trained on")
    if options.is_demo and source.has_edits:
        raise ValueError(f"{args.dataset} contains edits, but the demo model cannot edit: use images with captions")
    view = view_for(args, family, options, source.has_edits, others=False, trigger=trigger)
    if heldout and not view.teaches(heldout):
        raise ValueError(
            f"the teacher {view.name} reads nothing else for the held-out caption {heldout!r} ({view.sentence!r}): use "
            "one with the words that it replaces"
        )
    model = load_model(options, sees_images(view))
    side = side_of(args, family, options)
    encoding = Encoding.of(
        model.encoder.identity, family.name, view, trigger=trigger, resolution=side, multiple=family.pixel_multiple,
        empty_captions=args.empty_captions, heldout=heldout,
    )  # fmt: skip
    buckets = make_buckets(side**2, family.pixel_multiple)
    return _Work(args.output, source, model, view, encoding, buckets, args.skip_errors, tuple(remarks))


def _trigger_of(source: Source, trigger: str) -> str:
    """The trigger of all images: the given one, or that of the folders.

    Raises:
        ValueError: there are several; a shard would know only those of its own images, and leave the others in anchors.
    """
    concepts = concepts_of(own or trigger for _, own in source.known_captions())
    if len(concepts) > 1:
        raise ValueError(
            f"{source.title} has the concepts {', '.join(concepts)}, and shards have one: train on the folder itself, "
            "or encode the folder of each concept"
        )
    return concepts[0] if concepts else trigger


def _begin(work: _Work, lock: _Lock) -> None:
    lists = [problem for problem in work.source.problems if problem.severity == "error"]
    if lists and not work.skips_errors:
        raise ValueError(_sentence(work.source.title, Found(lists[:_LISTED], len(lists))))
    require_writable(work.output)
    with writing(work.output):
        work.output.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    begin(work.output, work.encoding, work.source.title)


def _end(work: _Work, every: Sequence[Found]) -> str:
    """Reports what the processes found and writes the index; returns what it contains in a line."""
    doubts = dict.fromkeys(doubt for found in every for doubt in found.doubts)
    listed = [p for p in work.source.problems if p.severity == "warning"][:_LISTED]
    warn([*work.remarks, *list(doubts)[:_LISTED], *(p.message for p in listed)])
    errors = Found()
    for found in every:
        errors = errors.and_also(found)
    if errors.count and not work.skips_errors:
        raise ValueError(_sentence(work.source.title, errors))
    for problem in errors.errors:
        say(str(problem))
    finished = finish(work.output, work.encoding, work.source.title, work.source.parts)
    warn(finished.remarks)
    return finished.index.describe(work.output)


def _sentence(title: str, found: Found) -> str:
    lines = "\n".join(map(str, found.errors))
    more = f"\nand {found.count - len(found.errors)} more" if found.count > len(found.errors) else ""
    return printable(
        f"{found.count} errors in the dataset {title}; the same command continues when they are corrected, or leaves "
        f"these images out with --skip-errors:\n{lines}{more}"
    )


class _Lock:
    """The lock of the folder, held by the first process."""

    def __init__(self, folder: Path) -> None:
        self._lock = FolderLock(folder)

    def acquire(self) -> None:
        self._lock.acquire()

    def close(self) -> None:
        self._lock.release()


@dataclass
class Found:
    """What a process found in its share.

    Attributes:
        errors: the first errors.
        count: number of all errors.
        doubts: warnings, without repetitions.
    """

    errors: list[Problem] = field(default_factory=list)
    count: int = 0
    doubts: dict[str, None] = field(default_factory=dict)

    def add(self, problems: Sequence[Problem], doubts: Sequence[str]) -> None:
        """Adds those of a shard."""
        errors = [problem for problem in problems if problem.severity == "error"]
        self.errors = [*self.errors, *errors][:_LISTED]
        self.count += len(errors)
        lines = [*doubts, *(str(p).partition(": ")[2] for p in problems if p.severity == "warning")]
        self.doubts = dict.fromkeys([*self.doubts, *lines][:_LISTED])

    def and_also(self, other: Found) -> Found:
        """Both."""
        return Found([*self.errors, *other.errors][:_LISTED], self.count + other.count)


@dataclass(frozen=True, eq=False)
class _Work:
    """What is to be encoded, how, and into which folder."""

    output: Path
    source: Source
    model: HostModel
    view: TeacherView
    encoding: Encoding
    buckets: Sequence[Bucket]
    skips_errors: bool
    remarks: Sequence[str]

    def encode(self, peers: Peers) -> Found:
        """Encodes this process's share of the shards that are missing."""
        rank, size = peers.world.rank, peers.world.size
        parts = range(rank, self.source.parts, size)
        found, total = Found(), self.source.count(parts)
        name = "encoding" if size == 1 else f"encoding, process 1 of {size}"
        with tqdm(total=total, unit="image", desc=name, disable=not peers.is_first) as bar:
            for done, part in enumerate(parts, 1):
                for chunk in self.source.chunks(part):
                    self._encode_chunk(part, chunk, found, bar)
                if total is None:  # as if the other parts were as large on average
                    bar.total = round(bar.n * len(parts) / done)
                    bar.refresh()
        return found

    def _encode_chunk(self, part: int, chunk: Chunk, found: Found, bar: tqdm) -> None:
        name, before = shard_name(part, chunk.number), bar.n
        facts = ShardRows(self.encoding.digest(), chunk.stamp, chunk.is_last)
        whole = read_rows(self.output, name)
        if whole is not None and _is_same(whole[1], facts) and (self.skips_errors or not whole[1].lost):
            bar.initial += chunk.count  # no part of the speed
            bar.update(chunk.count)
            return
        with tempfile.TemporaryDirectory(prefix="dopsd-") as place:
            problems = Problems()
            checker = ImageChecker(self.source.root or Path(place), self.buckets, problems)
            pairs = check_entries(chunk.entries(Path(place), problems), checker, self.encoding.trigger)
            captions = [caption for pair in pairs for caption in pair.captions]
            found.add(_named(problems.found, place), self.model.doubts(captions))
            if self.skips_errors or not any(problem.severity == "error" for problem in problems.found):
                self._write(name, pairs, facts, checker, chunk, bar)
        bar.update(before + chunk.count - bar.n)

    def _write(
        self, name: str, pairs: list[Pair], facts: ShardRows, checker: ImageChecker, chunk: Chunk, bar: tqdm
    ) -> None:  # fmt: skip
        before = bar.n

        def on_encoded(done: int, total: int, cached: bool) -> None:
            bar.update(before + done * chunk.count // total - bar.n)

        images = encode_images(
            pairs, self.model.encoder, self.view, self.encoding, is_first=name == shard_name(0, 0),
            on_encoded=on_encoded,
        )  # fmt: skip
        digests = tuple("/".join((target, *rest)) for target, twins in checker.seen.items() for rest in twins)
        masked, lost = sum(pair.mask is not None for pair in pairs), chunk.count - len(pairs)
        facts = replace(facts, masked=masked, lost=lost, images=digests)
        write_shard(self.output, name, images, self.model.family, facts)


def _is_same(rows: ShardRows, facts: ShardRows) -> bool:
    return (rows.encoding, rows.stamp, rows.is_last) == (facts.encoding, facts.stamp, facts.is_last)


def _named(problems: Sequence[Problem], place: str) -> list[Problem]:
    """The problems without the temporary folder of images that are no files."""
    return [replace(problem, message=problem.message.replace(place + os.sep, "")) for problem in problems]
