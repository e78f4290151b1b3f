"""The tests on the pretend CUDA device, in every mode on every card, as two sections of docs/reliability.md.

    python -m benchmarks.pretend_cuda_table --parts                  what `make test-cuda` runs
    python -m benchmarks.pretend_cuda_table                          all of tests/comfyui; hours on two cores
    python -m benchmarks.pretend_cuda_table --modes dynamic --capabilities 8.9

The sections are written after every run of pytest, and say what has not run. The same command continues after a stop.
What passes there is a fact about bytes, waits and order. It is none about speed, CUDA's kernels or their rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import resource
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.journal import Journal
from benchmarks.report import RELIABILITY, WORK, Section, Table, comfyui_version, measured_here, record

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from pretend_cuda import build  # noqa: E402
from pretend_cuda.__main__ import environment, pytest_command  # noqa: E402
from pretend_cuda.modes import CAPABILITIES, MODES  # noqa: E402
from pretend_cuda.parts import PARTS  # noqa: E402

CARDS = {"8.9": "Ada (8.9)", "7.5": "Turing (7.5)"}
IN_COMFYUI = tuple(name for name in ("dynamic", "classic", *MODES) if name != "core")
ORDER = tuple(dict.fromkeys((mode, card) for card in CAPABILITIES for mode in IN_COMFYUI))
"""Modes and cards, what most users have first."""
LEFT_OUT = ("test_comfy_cli.py", "test_cost.py")  # commands of their own, with environments of their own
GROUPS = {
    "on_cuda": "on_cuda/test_*.py",
    **{f"{a}-{b}": f"test_[{a}-{b}]*.py" for a, b in ("ac", "dh", "ik", "lr", "sz")},
}
"""The tests of tests/comfyui in runs of pytest that a stop may cost; patterns of file names."""
FORM = re.compile(r"\[(?:some-|all-)?(?P<form>[^\]]+)\]$")
BY_FORM = ("test_gradients", "test_trainings", "test_two_waits_per_optimizer_step_and_none_in_the_backward")
"""The tests of tests/comfyui/on_cuda that have a base weight's form as parameter."""


@dataclass(frozen=True)
class Wanted:
    """A run of pytest.

    Attributes:
        title: of its row in the table.
        group: of the row's tests.
        mode: of the pretend device.
        capability: the card's, such as "8.9".
        arguments: of pytest.
    """

    title: str
    group: str
    mode: str
    capability: str
    arguments: tuple[str, ...]

    @property
    def key(self) -> list[str]:
        """What names its row in the journal, and whose arguments other tests would change."""
        return [self.title, self.group, self.mode, self.capability, " ".join(self.arguments)]


@dataclass
class Count:
    """Tests by how they ended.

    Attributes:
        passed: without an error.
        failed: with one, in the test or around it.
        skipped: not run.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, how: str) -> None:
        """One more test that ended like this: the name of a field."""
        setattr(self, how, getattr(self, how) + 1)

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        parts = [f"{self.passed} passed"]
        parts += [f"{count} {what}" for what, count in (("failed", self.failed), ("skipped", self.skipped)) if count]
        return ", ".join(parts)


@dataclass
class FormResult:
    """Of one form of the base weights.

    Attributes:
        tests: how its tests ended.
        waits: the host's waits for the device per optimizer step.
        trains: whether it trains.
    """

    tests: Count = field(default_factory=Count)
    waits: str = "?"
    trains: str = "not run"


@dataclass
class Result:
    """Of a run of pytest.

    Attributes:
        tests: how they ended.
        forms: those of each form of the base weights.
        failures: the names of the tests that failed.
        cpu_seconds: of the whole run.
        date: when it ran.
    """

    tests: Count = field(default_factory=Count)
    forms: dict[str, FormResult] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0
    date: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Result:
        """The inverse of `asdict`."""
        forms = {name: FormResult(**{**form, "tests": Count(**form["tests"])}) for name, form in row["forms"].items()}
        return cls(**{**row, "tests": Count(**row["tests"]), "forms": forms})


# -- running ----------------------------------------------------------------------------------------------------------


def parts() -> list[Wanted]:
    """What `make test-cuda` runs."""
    return [
        Wanted(f"`make test-cuda`, {name}", "", part.mode, part.capability, part.arguments)
        for name, part in PARTS.items()
    ]


def everything() -> list[Wanted]:
    """All of tests/comfyui in every mode on every card, but for the tests that need a browser."""
    wanted = []
    for mode, capability in ORDER:
        for group, pattern in GROUPS.items():
            files = sorted(p for p in (ROOT / "tests" / "comfyui").glob(pattern) if p.name not in LEFT_OUT)
            names = tuple(str(p.relative_to(ROOT)) for p in files)
            wanted.append(Wanted("all of tests/comfyui", group, mode, capability, (*names, "-m", "not browser")))
    return wanted


def run(wanted: Wanted) -> Result:
    """Runs pytest in a process of its own.

    Raises:
        RuntimeError: pytest did not come to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = pytest_command(*wanted.arguments, "-q", "-o", "junit_family=xunit1", f"--junitxml={report}")
        env = {**os.environ, **environment(wanted.mode, wanted.capability)}
        before = cpu_seconds()
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest did not run:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        result = read(ElementTree.parse(report).getroot())
        return dataclasses.replace(result, cpu_seconds=cpu_seconds() - before)


def cpu_seconds() -> float:
    """Of all processes that this one has waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(report: ElementTree.Element) -> Result:
    """What the report of a run of pytest says."""
    result = Result(date=datetime.date.today().isoformat())
    for case in report.iter("testcase"):
        how, name = outcome(case), case.get("name", "")
        result.tests.add(how)
        if how == "failed":
            result.failures.append(f"{case.get('classname')}::{name}")
        found = FORM.search(name)
        if found and name.partition("[")[0] in BY_FORM:
            form = result.forms.setdefault(found["form"], FormResult())
            form.tests.add(how)
            if name.startswith("test_trainings"):
                form.trains = "yes" if how == "passed" else "NO"
            form.waits = next(properties(case, "waits"), form.waits)
    return result


def outcome(case: ElementTree.Element) -> str:
    """As a field of Count."""
    if case.find("skipped") is not None:
        return "skipped"
    return "passed" if case.find("failure") is None and case.find("error") is None else "failed"


def properties(case: ElementTree.Element, name: str) -> Iterator[str]:
    """The values of a test's properties of this name."""
    return (found.get("value", "") for found in case.iter("property") if found.get("name") == name)


# -- the page ---------------------------------------------------------------------------------------------------------


def results_of(journal: Journal) -> dict[tuple[str, ...], Result]:
    """What has run, by `Wanted.key`."""
    return {tuple(row["key"]): Result.from_row(row["result"]) for row in journal.rows}


def modes_section(results: Mapping[tuple[str, ...], Result]) -> Section:
    """A row for every part and every mode on every card, whether it ran or not; passed where every part has."""
    rows, failures, complete = [], [], True
    for title, mode, capability, wanted in by_row([*parts(), *everything()]):
        ran = [(w.group, results[key]) for w in wanted if (key := tuple(w.key)) in results]
        failures += [f"{mode}, {capability}: {name}" for _, result in ran for name in result.failures]
        complete = complete and (bool(ran) or not title.startswith("`make"))
        rows.append((title, mode, CARDS[capability], *figures(ran, len(wanted))))
    return Section(
        key="pretend-cuda",
        title="A pretend CUDA device",
        command="python -m benchmarks.pretend_cuda_table [--parts]",
        passed=complete and not failures,
        table=Table(("tests", "mode", "card", "date", "result", "minutes of a core"), tuple(rows)),
        notes=(
            "The CPU's kernels behind torch's real CUDA dispatch, with ComfyUI's own memory management "
            "(tests/pretend_cuda): facts about bytes, waits and order, not about speed or CUDA's kernels.",
            "".join(f"- {mode.name}: {mode.about}\n" for mode in MODES.values()).rstrip(),
            "PASSED: every part of `make test-cuda` passed, and nothing failed in what else has run.",
            *([f"Failed: {'; '.join(failures)}"] if failures else []),
        ),
    )


def figures(ran: Sequence[tuple[str, Result]], wanted: int) -> tuple[str, str, str]:
    """The date of the last run, how the tests ended, and the minutes of a core that they took."""
    if not ran:
        return "", "not run", ""
    tests, seconds = sum((result.tests for _, result in ran), Count()), sum(result.cpu_seconds for _, result in ran)
    part = "" if len(ran) == wanted else f" ({', '.join(group for group, _ in ran)} alone; the rest has not run)"
    return max(result.date for _, result in ran), f"{tests}{part}", f"{seconds / 60:.0f}"


def by_row(wanted: Sequence[Wanted]) -> list[tuple[str, str, str, list[Wanted]]]:
    """Title, mode, card and the runs of every row of the table."""
    rows: dict[tuple[str, str, str], list[Wanted]] = {}
    for one in wanted:
        rows.setdefault((one.title, one.mode, one.capability), []).append(one)
    return [(*key, runs) for key, runs in rows.items()]


def forms_section(results: Mapping[tuple[str, ...], Result]) -> Section:
    """A row for every form of base weights that ran in a mode on a card."""
    rows, failed = [], 0
    for mode, capability in ORDER:
        forms: dict[str, FormResult] = {}
        for key, result in results.items():
            if key[2:4] == (mode, capability):
                forms.update(result.forms)
        for name, form in forms.items():
            rows.append((mode, CARDS[capability], name, str(form.tests), form.waits, form.trains))
            failed += form.tests.failed
    return Section(
        key="pretend-cuda-bases",
        title="Base weights on the pretend CUDA device",
        command="python -m benchmarks.pretend_cuda_table [--parts]",
        passed=bool(rows) and not failed,
        table=Table(("mode", "card", "base", "its tests", "waits per optimizer step", "trains"), tuple(rows)),
        notes=(
            "Each base: gradients bit-equal with all, some and none of the weights on the device, a training, and the "
            "host's waits for the device in an optimizer step, of which none is in the backward.",
        ),
    )


def main() -> None:
    """Runs what has not been run yet and records the sections."""
    parser = argparse.ArgumentParser(description="The sections of the pretend CUDA device.")
    parser.add_argument("--parts", action="store_true", help="what `make test-cuda` runs, and not all of tests/comfyui")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=tuple(MODES))
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs have measured")
    parser.add_argument("--results", type=Path, default=RELIABILITY, help="JSON file of the page")
    chosen = parser.parse_args()
    build.build()
    machine = measured_here(modes_section({}), comfyui_version()).machine  # before the page changes the checkout
    journal = Journal.open(WORK / "pretend-cuda.jsonl", fresh=chosen.fresh)
    for wanted in parts() if chosen.parts else everything():
        if wanted.mode not in chosen.modes or wanted.capability not in chosen.capabilities:
            continue
        if tuple(wanted.key) not in results_of(journal):
            journal.append({"key": wanted.key, "result": asdict(run(wanted))})
        results = results_of(journal)
        print(f"{wanted.mode}, {wanted.capability}, {wanted.group}: {results[tuple(wanted.key)].tests}", flush=True)
        for section in (modes_section(results), forms_section(results)):
            record(dataclasses.replace(measured_here(section), machine=machine), chosen.results)
    sys.exit(not modes_section(results_of(journal)).passed)


if __name__ == "__main__":
    main()
