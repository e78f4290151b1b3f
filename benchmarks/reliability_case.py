"""One input of the fuzzer: made, read, judged, and made as small as it still fails."""

from __future__ import annotations

import os
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability_inputs import Broken, Kind, Refused
from benchmarks.reliability_mutators import Chance
from benchmarks.reliability_trees import snapshot
from benchmarks.report import ROOT


@dataclass(frozen=True)
class Case:
    """Input `number` of a kind.

    Attributes:
        kind: what is read.
        seed: of all inputs.
        number: which one.
        kept: the mutations that are applied; None for all of them.
    """

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
    """What came of an input.

    Attributes:
        outcome: "accepted", or the name of a documented exception.
        failure: what must not be; "" if nothing.
        trace: the traceback of a failure.
    """

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


def keep_input(work: Path, kind: str, number: int, trace: str) -> None:
    """Copies the input of a worker, and what was said about it, beside the workers."""
    place = work.parent / "failures" / f"{kind.replace(' ', '-')}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(work / "input", place / "input", symlinks=True, ignore=_no_pipes, ignore_dangling_symlinks=True)
    (place / "traceback.txt").write_text(trace, encoding="utf-8", errors="backslashreplace")


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    paths = {name: os.path.join(folder, name) for name in names}
    return [name for name, path in paths.items() if not (os.path.isfile(path) or os.path.isdir(path))]
