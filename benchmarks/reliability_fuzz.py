"""Fuzzing with tens of thousands of damaged inputs: no undocumented errors, no hangs, no changes of the user's data.

    python -m benchmarks.reliability fuzz                          all of them, in processes of their own
    python -m benchmarks.reliability fuzz --only "images:1234"     one of them again, with its traceback

Input n of a kind is a good one with a few mutations, all drawn from (seed, kind, n): it is the same on every machine.
A worker process reads a range of them; what hangs or kills it is noted and passed over. A failure is made as small as
leaving out mutations makes it, and its folder is kept.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability_inputs import KINDS, Broken, Kind, Refused
from benchmarks.reliability_mutators import Chance
from benchmarks.reliability_trees import snapshot
from benchmarks.report import ROOT, Journal, Progress, Section, Table

MEMORY_BYTES = 4 * 2**30
"""What an input may make a worker ask for; a MemoryError is an undocumented error."""

CHUNK = 100
"""Inputs per row of the journal."""

TASK = 2_000
"""Inputs that one worker process reads."""

ALL_SHARES = 50_000


# -- one input ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Input `number` of a kind; `kept` are the mutations that are applied, all of them if None."""

    kind: Kind
    seed: int
    number: int
    kept: tuple[int, ...] | None = None

    def mutations(self) -> tuple[int, ...]:
        """The numbers of its mutations; now and then there are none, and the input is a good one."""
        if self.kept is not None:
            return self.kept
        return tuple(range(self._chance("count").choice((0, 1, 1, 1, 1, 1, 2, 2, 3, 5, 8))))

    def write(self, folder: Path) -> None:
        """Makes the input in an empty folder."""
        tree = self.kind.make(self._chance("seed"))
        for number in self.mutations():
            chance = self._chance(f"mutation {number}")
            chance.choice(self.kind.mutations)(tree, chance)
        tree.write(folder)

    def read(self, folder: Path) -> None:
        """Hands it to the functions that are on trial."""
        self.kind.read(folder, self._chance("read"))

    def _chance(self, what: str) -> Chance:
        return Chance(f"{self.seed}:{self.kind.name}:{self.number}:{what}")


@dataclass(frozen=True)
class Verdict:
    """outcome: "accepted", or the name of a documented exception. failure: what must not be, "" if nothing."""

    outcome: str
    failure: str
    trace: str = ""


def try_case(case: Case, work: Path) -> Verdict:
    """Writes the input into a folder of `work`, has it read, and looks at what came of it."""
    folder = work / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.write(folder)
    before = snapshot(folder)
    try:
        case.read(folder)
        verdict = Verdict("accepted", "")
    except Refused as refused:
        verdict = Verdict(str(refused), "")
    except Exception as error:
        verdict = judge(error, case.kind)
    if not verdict.failure and (after := snapshot(folder)) != before:
        changed = sorted(set(before.items()) ^ set(after.items()))
        verdict = Verdict(verdict.outcome, f"the user's data changed: {changed[0][0]!r}")
    return verdict


def judge(error: Exception, kind: Kind) -> Verdict:
    """Whether an exception is one that the functions document, raised by them on purpose and with words in it."""
    name = type(error).__name__
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, Broken):
        return Verdict("broken", str(error).partition("\n")[0], trace)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{_short(last.filename)}:{last.name}"
    is_ours = type(error).__module__.rpartition(".")[0].endswith("dopsd_core") or type(error) in kind.documented
    if not isinstance(error, kind.documented) or not (is_ours or isinstance(error, OSError)):
        return Verdict(name, f"undocumented {name} in {place}", trace)
    if not (_short(last.filename).startswith(("dopsd_core", "nodes")) or isinstance(error, OSError)):
        return Verdict(name, f"{name} that is not our own, in {place}", trace)
    if not str(error).strip():
        return Verdict(name, f"{name} without a word, in {place}", trace)
    return Verdict(name, "")


def _short(filename: str) -> str:
    """A file's place in this checkout, or the last two parts of its path."""
    path = Path(os.path.realpath(filename))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:]))


def shrink(case: Case, failure: str, work: Path) -> Case:
    """The case with as few of its mutations as still give the same failure."""
    kept = case.mutations()
    for number in case.mutations():
        fewer = tuple(other for other in kept if other != number)
        smaller = Case(case.kind, case.seed, case.number, fewer)
        if try_case(smaller, work).failure == failure:
            kept = fewer
    return Case(case.kind, case.seed, case.number, kept)


# -- a worker ----------------------------------------------------------------------------------------------------------


def run_worker(kinds: Sequence[Kind], spec: dict[str, Any]) -> None:
    """Reads the inputs of a task, and prints a row per chunk. spec: kind, seed, start, stop, skip, work."""
    import torch

    torch.set_num_threads(1)
    (kind,) = (kind for kind in kinds if kind.name == spec["kind"])
    kind.make(Chance(0))  # what is loaded for it takes memory too
    limit = _virtual_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work, skip = Path(spec["work"]), set(spec["skip"])
    for start in range(spec["start"], spec["stop"], CHUNK):
        numbers = [number for number in range(start, min(start + CHUNK, spec["stop"])) if number not in skip]
        row = _read_chunk(kind, spec["seed"], numbers, work)
        print(json.dumps({"kind": kind.name, "start": start, **row}), flush=True)


def _read_chunk(kind: Kind, seed: int, numbers: Iterable[int], work: Path) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    failures, slowest, worst = [], 0.0, -1
    for number in numbers:
        (work / "current").write_text(str(number))
        faulthandler.dump_traceback_later(kind.hang_seconds, exit=True)  # its thread ends a hang inside C code too
        began = time.perf_counter()
        case = Case(kind, seed, number)
        verdict = try_case(case, work)
        seconds = time.perf_counter() - began
        faulthandler.cancel_dump_traceback_later()
        slowest, worst = max((slowest, worst), (seconds, number))
        outcomes[verdict.outcome] += 1
        if verdict.failure:
            failures.append({"number": number, **_kept_failure(case, verdict, work)})
    return {"outcomes": dict(outcomes), "failures": failures, "slowest": slowest, "slowest_number": worst}


def _kept_failure(case: Case, verdict: Verdict, work: Path) -> dict[str, Any]:
    """Keeps the smallest input with this failure, and says what it is."""
    small = shrink(case, verdict.failure, work)
    again = try_case(small, work)
    _keep_input(work, case.kind.name, case.number, again.trace or again.failure)
    return {"failure": verdict.failure, "mutations": list(small.mutations())}


def _keep_input(work: Path, kind: str, number: int, trace: str) -> None:
    """Copies the input of a worker, and what was said about it, beside the workers."""
    place = work.parent / "failures" / f"{kind.replace(' ', '-')}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(work / "input", place / "input", symlinks=True, ignore=_no_pipes, ignore_dangling_symlinks=True)
    (place / "traceback.txt").write_text(trace, encoding="utf-8", errors="backslashreplace")


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    paths = {name: os.path.join(folder, name) for name in names}
    return [name for name, path in paths.items() if not (os.path.isfile(path) or os.path.isdir(path))]


def _virtual_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


# -- the parent --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A range of inputs of one kind."""

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
        _keep_input(work, task.kind, number, said[-20_000:])
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


def core_kinds() -> tuple[Kind, ...]:
    """The kinds that need no ComfyUI."""
    return KINDS


def all_kinds() -> tuple[Kind, ...]:
    """All kinds; those of ComfyUI boot it when the first input of theirs is made."""
    from benchmarks.reliability_inputs_comfyui import COMFYUI_KINDS

    return (*KINDS, *COMFYUI_KINDS)
