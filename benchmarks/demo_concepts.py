"""The demo on several unseen concepts: median and worst of its figures by method, for docs/results.md.

    python -m benchmarks.demo_concepts --seeds 10 --training-seeds 1 --jobs 2

Each concept is a run of `python -m dopsd_core demo`; those that are in --output already are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import RESULTS, WORK, Section, Table, measured_here, on_this_model, record
from dopsd_core.standalone.compare import METHODS
from dopsd_core.standalone.evaluate import TITLES

Report = Mapping[str, Any]


def run_demo(seed: int, output: Path, jobs: int, training_seeds: int) -> Report:
    """The report of the demo on one concept; what an earlier call has left in `output` is not run again."""
    folder = output / f"concept-{seed}"
    if not (folder / "report.json").exists():
        command = [sys.executable, "-m", "dopsd_core", "demo", "--concept-seed", str(seed), "--output", str(folder)]
        subprocess.run([*command, "--jobs", str(jobs), "--seeds", str(training_seeds)], check=True, capture_output=True)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def figure(report: Report, method: str, name: str) -> float:
    """The mean of a figure over the training seeds of a method."""
    return report["methods"][method][name]["mean"]


def section(reports: Sequence[Report], training_seeds: int, jobs: int) -> Section:
    """Median and worst of every figure over the concepts, a row per method."""
    lines = tuple(
        (whose, *(_median_and_worst([figure(r, method, name) for r in reports], name) for name in TITLES))
        for method, whose in METHODS.items()
    )
    closed = [report["gap_closed"] for report in reports]
    seconds, memory = ([report[name] for report in reports] for name in ("wall_seconds", "peak_rss_mb"))
    return Section(
        "demo-concepts",
        f"{len(reports)} concepts that nobody tuned on",
        f"python -m benchmarks.demo_concepts --seeds {len(reports)} --training-seeds {training_seeds} --jobs {jobs}",
        None,
        Table(("", *TITLES.values()), lines),
        (
            f"Median over the concepts, and the worst of them in parentheses. Training runs per concept and method: "
            f"{training_seeds}. D-OPSD closed {median(closed):.0%} of the gap between the untouched model and its own "
            f"teacher, on the worst concept {min(closed):.0%}. A concept took {median(seconds):.0f} s and "
            f"{max(memory) / 1000:.1f} GB.",
        ),
    )


def _median_and_worst(values: Sequence[float], name: str) -> str:
    worst = min(values) if name in ("prompt_following", "sharpness") else max(values)  # none is sharper than renders
    return f"{_short(median(values))} ({_short(worst)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Runs the demo on further concepts and records the median and the worst of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "demo-concepts")
    parser.add_argument("--seeds", type=int, default=10, help="concepts 0 to N-1")
    parser.add_argument("--jobs", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--training-seeds", type=int, default=3, help="training runs per concept and method")
    args = parser.parse_args()
    folder = on_this_model(args.output)
    reports = [run_demo(seed, folder, args.jobs, args.training_seeds) for seed in range(args.seeds)]
    found = measured_here(section(reports, args.training_seeds, args.jobs))
    record(found, RESULTS)
    print(found.to_markdown())


if __name__ == "__main__":
    main()
