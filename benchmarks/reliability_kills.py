"""Kills training at random times and during saves; each resumed run must be bit-identical to an uninterrupted one.

    python -m benchmarks.reliability kills --count 200

A tiny network with everything in it that draws or has a state (tests/tiny.py), so that a run takes a second. The child
says in a shared byte what it is doing; the parent kills it at a random moment of the run, or at a random moment of a
save, and reads the byte. After each kill every file under a final name must be whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  an optimizer imports it at its first step, which would take a second of each child

from benchmarks.journal import Journal, Progress
from benchmarks.report import Section, counts_table
from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.config import TrainConfig
from dopsd_core.options import changed
from dopsd_core.training.log import LOG_NAME, read_log
from dopsd_core.training.run import Run
from dopsd_core.training.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, LORA_NAME
from dopsd_core.training.trainer import train
from tests.tiny import TinyDenoiser, killable_config, killable_data, saved_bytes

PHASES = ("starting", "opening the run", "training", "inside a checkpoint's save", "inside the LoRA's save")
STARTING, OPENING, TRAINING, SAVING, SAVING_LORA = range(len(PHASES))

KILLS_PER_RUN = 8
AIMS = {None: 0.5, SAVING: 0.3, SAVING_LORA: 0.1, OPENING: 0.1}
"""What a kill waits for, and the share of the kills; None: for nothing, any moment of the run."""

LONGEST_RUN = 120.0
"""Seconds after which a child that was not to be killed counts as hanging."""


@dataclass(frozen=True)
class Uncut:
    """A run that nothing interrupted.

    Attributes:
        saved: what it left: file -> bytes.
        seconds: of all of it.
        phase_seconds: of one visit to each phase.
    """

    saved: dict[str, bytes]
    seconds: float
    phase_seconds: dict[int, float]


def configurations(steps: int) -> tuple[TrainConfig, ...]:
    """The runs that take turns: every teacher, both objectives, one or two checkpoints kept."""
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"teacher": "frozen", "keep_checkpoints": 1, "checkpoint_every": 2},
        {"teacher": "same", "checkpoint_every": 1},
        {"objective": "sft", "seed": 5},
    )
    return tuple(changed(killable_config(steps), change) for change in changes)


# -- the child ---------------------------------------------------------------------------------------------------------


def train_marked(config: str, folder: str, mark_file: str) -> None:
    """The run of a JSON configuration in `folder`, which says in the first byte of `mark_file` what it is doing."""
    torch.set_num_threads(1)
    with _mapped(Path(mark_file)) as mark, _marked_run(mark):
        mark[0] = TRAINING
        train(TrainConfig.from_json(config), TinyDenoiser(), killable_data(), folder)


@contextmanager
def _marked_run(mark: mmap.mmap) -> Iterator[None]:
    """Inside, the methods of a run that are phases of their own say so."""
    real = {name: getattr(Run, name) for name in ("open", "save", "save_lora")}
    try:
        for (name, method), phase in zip(real.items(), (OPENING, SAVING, SAVING_LORA), strict=True):
            setattr(Run, name, _marking(method, mark, phase))
        yield
    finally:
        for name, method in real.items():
            setattr(Run, name, method)


def _marking(function: Callable[..., Any], mark: mmap.mmap, phase: int) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        before, mark[0] = mark[0], phase
        try:
            return function(*args, **kwargs)
        finally:
            mark[0] = before

    return marked


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's first byte, shared with whoever maps it, after a kill too."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 1) as mark:
        yield mark


# -- the parent --------------------------------------------------------------------------------------------------------


class Killer:
    """Starts the child for one configuration and kills it."""

    def __init__(self, config: TrainConfig, work: Path, chance: random.Random) -> None:
        self._config, self._work, self._chance = config, work, chance
        self._mark_file = work / "mark"

    def uncut(self) -> Uncut:
        """A run from start to end without a kill."""
        folder = self._work / "uncut"
        shutil.rmtree(folder, ignore_errors=True)
        child, began, before = self._start(folder), time.monotonic(), STARTING
        spent, visits = [0.0] * len(PHASES), [0] * len(PHASES)
        with _mapped(self._mark_file) as mark:
            while child.is_alive():
                looked, phase = time.monotonic(), mark[0]
                visits[phase] += phase != before
                time.sleep(0.0002)
                spent[phase] += time.monotonic() - looked
                before = phase
        child.join()
        if child.exitcode != 0:
            raise RuntimeError(f"the uninterrupted run failed with exit code {child.exitcode}")
        each = {phase: spent[phase] / max(visits[phase], 1) for phase in range(len(PHASES))}
        return Uncut(saved_state(folder), time.monotonic() - began, each)

    def killed(self, folder: Path, uncut: Uncut) -> int | None:
        """Starts or resumes the run in `folder` and kills it; the phase that the kill met, None if it came too late."""
        (aim,) = self._chance.choices(list(AIMS), list(AIMS.values()))
        child = self._start(folder)
        with _mapped(self._mark_file) as mark:
            if aim is not None:
                self._await(aim, child, mark)
            time.sleep(self._chance.uniform(0, uncut.seconds if aim is None else uncut.phase_seconds[aim]))
            child.kill()
            child.join()
            return None if child.exitcode == 0 else mark[0]

    def finish(self, folder: Path) -> bool:
        """Lets the run come to its end; whether it did."""
        child = self._start(folder)
        child.join(LONGEST_RUN)
        child.kill()
        child.join()
        return child.exitcode == 0

    def _start(self, folder: Path) -> Any:
        self._mark_file.write_bytes(bytes([STARTING]))
        arguments = (self._config.to_json(), str(folder), str(self._mark_file))
        child = _processes().Process(target=train_marked, args=arguments)
        child.start()
        return child

    def _await(self, phase: int, child: Any, mark: mmap.mmap) -> None:
        """Returns in the n-th visit to the phase from now, n drawn, or at the end of the child."""
        for _ in range(self._chance.randint(1, 6) if phase == SAVING else 1):
            for wanted in (False, True):
                while child.is_alive() and (mark[0] == phase) is not wanted:
                    time.sleep(0.0001)


def _processes() -> Any:
    """Children are forked from a server that has imported torch and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.reliability_kills"])
    return context


def saved_state(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but the wall times: weights, optimizer, header, and which steps its log has."""
    steps = [report.step for report in read_log(folder / LOG_NAME)]
    return saved_bytes(folder) | {"log": repr(steps).encode()}


def leftovers_of(folder: Path) -> list[str]:
    """Files of killed saves that nothing has removed."""
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def torn_files(folder: Path) -> list[str]:
    """What lies under a final name in a run's folder and is not whole; a kill may leave none."""
    torn = []
    for checkpoint in (folder / CHECKPOINTS_NAME).glob("step-*"):
        if not _is_whole_checkpoint(checkpoint):
            torn.append(checkpoint.name)
    for name, read in ((CONFIG_NAME, _read_config), (LORA_NAME, load_lora)):
        try:
            if (folder / name).exists():
                read(folder / name)
        except Exception:  # whatever it raises, the file is not whole
            torn.append(name)
    return torn


def _read_config(path: Path) -> None:
    TrainConfig.from_json(path.read_text(encoding="utf-8"))


def _is_whole_checkpoint(folder: Path) -> bool:
    """By the checksums in its state.json, read here without the code that is on trial."""
    try:
        sums = json.loads((folder / "state.json").read_text(encoding="utf-8"))["sha256"]
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected for name, expected in sums.items()
        )
    except (OSError, ValueError, KeyError):
        return False


# -- the measurement ---------------------------------------------------------------------------------------------------


def cut_run(killer: Killer, folder: Path, uncut: Uncut, most: int) -> dict[str, Any]:
    """One run that is killed up to `most` times and then left to end: its row of the journal."""
    shutil.rmtree(folder, ignore_errors=True)
    phases: Counter[str] = Counter()
    torn: list[str] = []
    ended = False
    while not ended and phases.total() < most:
        phase = killer.killed(folder, uncut)
        ended = phase is None
        if phase is not None:
            phases[PHASES[phase]] += 1
            torn += torn_files(folder)
    ended = ended or killer.finish(folder)
    identical = ended and saved_state(folder) == uncut.saved
    leftovers = leftovers_of(folder)
    row = {"kills": dict(phases), "torn": torn, "ended": ended, "identical": identical, "leftovers": leftovers}
    if identical and not torn and not leftovers:
        shutil.rmtree(folder)
    return row


def measure(count: int, steps: int, seed: int, work: Path, fresh: bool) -> Section:
    """Kills until there were `count` of them, in all the journals together."""
    work = work / "kills"
    journal = Journal.open(work / "journal.jsonl", fresh=fresh)
    configs = configurations(steps)
    chance = random.Random(f"{seed}:{len(journal.rows)}")
    killers = [Killer(config, work, chance) for config in configs]
    uncuts: dict[int, Uncut] = {}
    progress = Progress("kills", count, kills_in(journal))
    while (left := count - kills_in(journal)) > 0:
        number = len(journal.rows)
        which = number % len(configs)
        uncut = uncuts[which] = uncuts.get(which) or killers[which].uncut()
        row = cut_run(killers[which], work / f"run-{number}", uncut, min(left, KILLS_PER_RUN))
        journal.append(row)
        progress.show(kills_in(journal), "" if row["identical"] else f"run-{number} is NOT identical")
    return summary(journal, seed)


def kills_in(journal: Journal) -> int:
    """Kills of all runs so far."""
    return sum(sum(row["kills"].values()) for row in journal.rows)


def summary(journal: Journal, seed: int) -> Section:
    """The section of the page."""
    phases: Counter[str] = Counter()
    for row in journal.rows:
        phases.update(row["kills"])
    wrong = [number for number, row in enumerate(journal.rows) if not row["identical"]]
    torn = sum(len(row["torn"]) for row in journal.rows)
    leftovers = sum(len(row["leftovers"]) for row in journal.rows)
    rows: list[tuple[str, object]] = [("SIGKILLs", phases.total())]
    rows += [(f"of them {phase}", phases[phase]) for phase in PHASES]
    rows += [
        ("runs", len(journal.rows)),
        ("runs that ended with the bits of the uninterrupted run", len(journal.rows) - len(wrong)),
        ("files under their final name that a kill left torn", torn),
        ("leftovers of killed saves after the end", leftovers),
    ]
    return Section(
        key="kills",
        title="SIGKILLs of a training",
        command=f"python -m benchmarks.reliability kills --count {phases.total()} --seed {seed}",
        passed=not wrong and not torn and not leftovers,
        table=counts_table(rows),
        notes=(
            "Compared bit for bit: the LoRA with its header, LoRA, teacher and optimizer of the newest checkpoint, and "
            "the steps in the log. The tiny network of tests/tiny.py, four configurations in turn (teachers ema, "
            "frozen, same; D-OPSD and SFT; a checkpoint every 1 to 3 steps). Half of the kills come at any moment; the "
            "others wait for a save of the checkpoint or the LoRA, or for the opening of the run.",
        ),
    )


def available() -> str:
    """Why this measurement cannot run here, or ""."""
    return "" if os.name == "posix" else "SIGKILL is POSIX only"
