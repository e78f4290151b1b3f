"""The demo on several unseen concepts: median and worst of its figures, for docs/results.md.

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

from benchmarks.report import RESULTS, WORK, Section, Table, measured_here, record
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


def rows(reports: Sequence[Report]) -> dict[str, tuple[list[float], bool]]:
    """Name -> (one value per concept, whether more is better)."""
    table: dict[str, tuple[list[float], bool]] = {
        "share of the concept gap closed by D-OPSD": ([r["gap_closed"] for r in reports], True)
    }
    for name, title in TITLES.items():
        for method, whose in METHODS.items():
            better = name in ("prompt_following", "sharpness")  # sharper than renders has not been seen
            table[f"{title}, {whose}"] = ([figure(r, method, name) for r in reports], better)
    for method in ("dopsd", "sft"):
        ratio = [figure(r, method, "frechet_prior") / figure(r, "base", "frechet_prior") for r in reports]
        table[f"{TITLES['frechet_prior']}, over the untouched model's, {METHODS[method]}"] = (ratio, False)
    table["wall seconds"] = ([r["wall_seconds"] for r in reports], False)
    table["peak memory, MB"] = ([r["peak_rss_mb"] for r in reports], False)
    return table


def section(reports: Sequence[Report], training_seeds: int, jobs: int) -> Section:
    """Median and worst of every figure over the concepts."""
    lines = tuple(
        (name, f"{median(values):.3g}", f"{min(values) if more_is_better else max(values):.3g}")
        for name, (values, more_is_better) in rows(reports).items()
    )
    return Section(
        "demo-concepts",
        f"{len(reports)} concepts that nobody tuned on",
        f"python -m benchmarks.demo_concepts --seeds {len(reports)} --training-seeds {training_seeds} --jobs {jobs}",
        None,
        Table(("figure", "median", "worst"), lines),
        (f"Training runs per concept and method: {training_seeds}.",),
    )


def main() -> None:
    """Runs the demo on further concepts and records the median and the worst of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "demo-concepts")
    parser.add_argument("--seeds", type=int, default=10, help="concepts 0 to N-1")
    parser.add_argument("--jobs", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--training-seeds", type=int, default=3, help="training runs per concept and method")
    args = parser.parse_args()
    reports = [run_demo(seed, args.output, args.jobs, args.training_seeds) for seed in range(args.seeds)]
    found = measured_here(section(reports, args.training_seeds, args.jobs))
    record(found, RESULTS)
    print(found.to_markdown())


if __name__ == "__main__":
    main()
