"""Fuzzing with tens of thousands of damaged inputs: no undocumented errors, no hangs, no changes of the user's data.

    python -m benchmarks.reliability fuzz                          all of them, in processes of their own
    python -m benchmarks.reliability fuzz --only "images:1234"     one of them again, with its traceback

Input n of a kind is a good one with a few mutations, all drawn from (seed, kind, n): it is the same on every machine.
A worker process reads a range of them; what hangs or kills it is noted and passed over. A failure is made as small as
leaving out mutations makes it, and its folder is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.journal import Journal, Progress
from benchmarks.reliability_case import Case, keep_input, try_case
from benchmarks.reliability_inputs import Kind
from benchmarks.reliability_worker import CHUNK, MEMORY_BYTES
from benchmarks.report import ROOT, Section, Table

TASK = 2_000
"""Inputs that one worker process reads."""

ALL_SHARES = 50_000


@dataclass(frozen=True)
class Task:
    """A range of inputs of one kind.

    Attributes:
        kind: its name.
        start: the first input.
        stop: the one after the last.
    """

    kind: str
    start: int
    stop: int


class Fuzz:
    """Hands tasks to workers and writes down what they say."""

    def __init__(self, seed: int, work: Path, journal: Journal, total: int) -> None:
        self._seed, self._work, self._journal = seed, work, journal
        self._lock = threading.Lock()
        self._progress = Progress("inputs", total, inputs_in(journal))

    def run(self, task: Task) -> None:
        """A worker for the task; another one behind every input that ends a worker."""
        start, skip = task.start, list[int]()
        while start < task.stop:
            start, ended = self._run_worker(task, start, skip)
            if ended is not None:
                skip.append(ended)

    def _run_worker(self, task: Task, start: int, skip: list[int]) -> tuple[int, int | None]:
        """Until the worker ends: the first input that is not in the journal, and the one that ended the worker."""
        work = self._work / f"worker-{task.kind.replace(' ', '-')}-{task.start}"
        work.mkdir(parents=True, exist_ok=True)
        spec = {"kind": task.kind, "seed": self._seed, "start": start, "stop": task.stop, "skip": skip}
        command = [sys.executable, "-m", "benchmarks.reliability_worker", json.dumps({**spec, "work": str(work)})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        errors = (work / "errors.txt").open("wb")
        with errors, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=errors) as worker:
            for line in worker.stdout or ():
                if line.startswith(b'{"kind"'):
                    start = self._note(json.loads(line), skip, task)
        if worker.returncode == 0:
            shutil.rmtree(work)
            return task.stop, None
        current = work / "current"
        if not current.exists():
            raise RuntimeError(f"the worker of {task} did not start:\n{(work / 'errors.txt').read_text()[-2000:]}")
        number = int(current.read_text())
        said = (work / "errors.txt").read_text(errors="replace")
        keep_input(work, task.kind, number, said[-20_000:])
        self._note_death(task, number, worker.returncode, said)
        return start, number

    def _note(self, row: dict[str, Any], skip: Sequence[int], task: Task) -> int:
        with self._lock:
            stop = min(row["start"] + CHUNK, task.stop)
            self._journal.append({**row, "stop": stop})
            failed = sum(len(one["failures"]) for one in self._journal.rows)
            self._progress.show(inputs_in(self._journal), f"{failed} failures")
        return stop

    def _note_death(self, task: Task, number: int, code: int, errors: str) -> None:
        hung = "Timeout (0:0" in errors
        failure = "a hang" if hung else f"the process died with exit code {code}"
        found = {"number": number, "failure": failure, "mutations": None}
        with self._lock:
            row = {"kind": task.kind, "start": number, "stop": number, "outcomes": {failure: 1}, "failures": [found]}
            self._journal.append({**row, "slowest": 0.0, "slowest_number": -1})


def inputs_in(journal: Journal) -> int:
    """Inputs read so far."""
    return sum(sum(row["outcomes"].values()) for row in journal.rows)


def open_tasks(kind: str, count: int, journal: Journal) -> list[Task]:
    """What of `count` inputs of a kind is not in the journal yet."""
    done = {row["start"] for row in journal.rows if row["kind"] == kind and row["stop"] > row["start"]}
    starts = [start for start in range(0, count, CHUNK) if start not in done]
    tasks: list[Task] = []
    for start in starts:
        stop = min(start + CHUNK, count)
        if tasks and tasks[-1].stop == start and stop - tasks[-1].start <= TASK:
            tasks[-1] = Task(kind, tasks[-1].start, stop)
        else:
            tasks.append(Task(kind, start, stop))
    return tasks


def measure(count: int, seed: int, jobs: int, work: Path, fresh: bool, kinds: Sequence[Kind]) -> Section:
    """Reads `count` inputs, shared among the kinds as in 50,000."""
    work = work / "fuzz"
    journal = Journal.open(work / "journal.jsonl", fresh=fresh)
    shares = {kind.name: max(count * kind.share // ALL_SHARES, 1) for kind in kinds}
    tasks = [task for name, share in shares.items() for task in open_tasks(name, share, journal)]
    fuzz = Fuzz(seed, work, journal, sum(shares.values()))
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(fuzz.run, tasks):
            pass
    return summary(journal, shares, seed)


def summary(journal: Journal, shares: dict[str, int], seed: int) -> Section:
    """The section of the page: a row per kind, and every failure in words."""
    rows, failures = [], Counter[str]()
    for name in shares:
        mine = [row for row in journal.rows if row["kind"] == name]
        outcomes = sum((Counter(row["outcomes"]) for row in mine), Counter[str]())
        found = [failure for row in mine for failure in row["failures"]]
        failures.update(f"{name}: {failure['failure']}" for failure in found)
        refused = ", ".join(f"{outcome} {n}" for outcome, n in outcomes.most_common() if outcome != "accepted")
        slowest = max((row["slowest"] for row in mine), default=0.0)
        figures = (outcomes.total(), outcomes["accepted"], refused, len(found), f"{slowest:.2f}")
        rows.append((name, *map(str, figures)))
    total = inputs_in(journal)
    columns = ("kind", "inputs", "accepted", "refused with", "failures", "slowest, s")
    notes = [
        "A failure is an exception that the function does not document or that comes out of another library, a hang "
        "over 10 s (60 s for a workflow, which may train a step), more than "
        f"{MEMORY_BYTES // 2**30} GB asked for, or a changed byte, name or link in the folder that was read.",
        *(f"{n} times: {failure}" for failure, n in failures.most_common()),
    ]
    return Section(
        key="fuzz",
        title="Damaged inputs",
        command=f"python -m benchmarks.reliability fuzz --count {sum(shares.values())} --seed {seed}",
        passed=not failures and total >= sum(shares.values()),
        table=Table(columns, (*rows, ("all", str(total), "", "", str(failures.total()), ""))),
        notes=tuple(notes),
    )


def show(kinds: Sequence[Kind], name: str, seed: int, work: Path) -> str:
    """One input again, "kind:number" or "kind:number:0,2" with some of its mutations; what came of it, in words."""
    wanted, number, *kept = name.split(":")
    (kind,) = (kind for kind in kinds if kind.name == wanted)
    chosen = tuple(int(word) for word in kept[0].split(",") if word) if kept else None
    case = Case(kind, seed, int(number), chosen)
    verdict = try_case(case, work / "fuzz" / "one")
    folder = work / "fuzz" / "one" / "input"
    return f"{folder}\nmutations {case.mutations()}\n{verdict.outcome}; {verdict.failure or 'fine'}\n{verdict.trace}"
