"""Runs all tests inside ComfyUI on the pretend CUDA device, in every mode and for every card, for docs/reliability.md.

    python -m benchmarks.pretend_cuda_table                                   an hour; needs ComfyUI and a C++ compiler
    python -m benchmarks.pretend_cuda_table --modes novram --capabilities 8.9 --tests tests/comfyui/on_cuda

What passes there is a fact about bytes, waits and order. It is none about speed, CUDA's kernels or their rounding.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from pretend_cuda import build  # noqa: E402
from pretend_cuda.__main__ import environment, pytest_command  # noqa: E402
from pretend_cuda.modes import CAPABILITIES, MODES  # noqa: E402

CARDS = {"8.9": "Ada (8.9)", "7.5": "Turing (7.5)"}
TESTS = ("tests/comfyui", "tests/comfyui/on_cuda")
OTHERS = [f"--ignore=tests/comfyui/test_{name}.py" for name in ("comfy_cli", "cost")]  # commands of their own
FORM = re.compile(r"\[(?:some-|all-)?(?P<form>[^\]]+)\]$")
BY_FORM = ("test_gradients", "test_trainings", "test_two_waits_per_optimizer_step_and_none_in_the_backward")
"""The tests of tests/comfyui/on_cuda that have a base weight's form as parameter."""


@dataclass
class Count:
    """Tests by how they ended."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, case: ElementTree.Element) -> None:
        if case.find("skipped") is not None:
            self.skipped += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            self.failed += 1
        else:
            self.passed += 1

    def __str__(self) -> str:
        parts = [f"{self.passed} passed"]
        parts += [f"{count} {what}" for what, count in (("failed", self.failed), ("skipped", self.skipped)) if count]
        return ", ".join(parts)


@dataclass
class FormResult:
    """Of one form of the base weights: its tests, the host's waits per optimizer step, whether it trains."""

    tests: Count = field(default_factory=Count)
    waits: str = "?"
    trains: bool = False


@dataclass
class Result:
    """Of all tests in one mode on one card."""

    mode: str
    capability: str
    tests: Count
    forms: dict[str, FormResult]
    failures: list[str]
    seconds: float


def run(mode: str, capability: str, tests: Sequence[str]) -> Result:
    """Runs pytest in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = pytest_command(*tests, "-m", "not browser", *OTHERS, "-q", f"--junitxml={report}")
        env = {**os.environ, **environment(mode, capability)}
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest did not run:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        return read(mode, capability, ElementTree.parse(report).getroot())


def read(mode: str, capability: str, report: ElementTree.Element) -> Result:
    """What the report of a run of pytest says."""
    result = Result(mode, capability, Count(), {}, [], 0.0)
    for case in report.iter("testcase"):
        result.tests.add(case)
        result.seconds += float(case.get("time", 0))
        failed = case.find("failure") is not None or case.find("error") is not None
        if failed:
            result.failures.append(f"{case.get('classname')}::{case.get('name')}")
        name, found = case.get("name", ""), FORM.search(case.get("name", ""))
        if found and name.partition("[")[0] in BY_FORM:
            form = result.forms.setdefault(found["form"], FormResult())
            form.tests.add(case)
            form.trains = form.trains or (name.startswith("test_trainings") and not failed)
            form.waits = next(properties(case, "waits"), form.waits)
    return result


def properties(case: ElementTree.Element, name: str) -> Iterator[str]:
    return (found.get("value", "") for found in case.iter("property") if found.get("name") == name)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(results: Sequence[Result]) -> str:
    """Both tables in Markdown, under a line that says where they were made."""
    torch, comfyui = importlib.metadata.version("torch"), os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")
    made = f"{datetime.date.today()}, torch {torch}, {platform.machine()}, ComfyUI at {comfyui}"
    modes = [
        (r.mode, MODES[r.mode].about, CARDS[r.capability], str(r.tests), f"{r.seconds / 60:.0f} min") for r in results
    ]
    forms = [
        (r.mode, CARDS[r.capability], name, str(form.tests), form.waits, "yes" if form.trains else "NO")
        for r in results
        for name, form in r.forms.items()
    ]
    failures = "".join(f"- {r.mode}, {r.capability}: {name}\n" for r in results for name in r.failures)
    return "\n".join(
        [
            f"Pretend CUDA device ({made}). Facts about bytes, waits and order; not about speed or kernels.\n",
            table(("mode", "what it is", "card", "tests inside ComfyUI", "time"), modes),
            table(("mode", "card", "base", "its tests", "waits per optimizer step", "trains"), forms),
            *([f"Failed:\n\n{failures}"] if failures else []),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of the pretend CUDA device.")
    modes = [name for name in MODES if name != "core"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest is given")
    chosen = parser.parse_args()
    build.build()
    results = []
    for mode in chosen.modes:
        for capability in chosen.capabilities:
            results.append(run(mode, capability, chosen.tests))
            print(f"{mode}, {capability}: {results[-1].tests}", file=sys.stderr, flush=True)
    print(report(results))
    sys.exit(any(result.failures for result in results))


if __name__ == "__main__":
    main()
