"""The demo's figures and images for docs/: D-OPSD next to SFT on one concept.

    python -m benchmarks.demo --output build/demo --jobs 2

Runs `python -m dopsd_core demo` with three runs per method (two to six minutes on two CPU cores), unless --output already holds its report; writes the section "demo" of docs/results.md, and docs/overview.png, docs/contact_sheet.png and docs/curves.png.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, WORK, Section, Table, measured_here, on_this_model, record
from dopsd_core.standalone.compare import METHODS
from dopsd_core.standalone.evaluate import TITLES

NOTES = (
    "Mean ± standard deviation over the training runs. Concept error: 1 − accuracy of the concept's shape, colour, center and texture, read by a classifier that never saw an image of the model. Prompt following: accuracy of position and background. Fréchet: distance between that classifier's features of the samples and of real renders of the same prompts; prior: prompts without [V]. Names wrong: 1 − accuracy of the appearance that the model knows under another name. Leakage: share of the concept's attributes in samples of prompts that name none (chance is about .19).",  # noqa: E501
    "![Targets and what each model draws: with the trigger, and of other prompts](contact_sheet.png)",
    "![Gap and loss over the steps](curves.png)",
)
IMAGES = ("overview.png", "contact_sheet.png", "curves.png")


def section(report: Mapping[str, Any], training_seeds: int) -> Section:
    """The page's section from the demo's report.json."""
    rows = tuple(
        (title, *(_mean_and_std(report["methods"][method][figure]) for figure in TITLES))
        for method, title in METHODS.items()
    )
    closed = f"Concept {report['concept']['seed']}: {report['concept']['looks']}. {report['config']['steps']} steps, 2-step sampling, unseen prompts, {training_seeds} training runs per method; SFT at the best of the learning rates {', '.join(report['sft']['tried'])} ({report['sft']['rate']:g}), DreamBooth at {report['dreambooth']['rate']:g}. D-OPSD closed {report['gap_closed']:.0%} of the gap between the untouched model and its own teacher. {report['wall_seconds']:.0f} s, {report['peak_rss_mb'] / 1000:.1f} GB."  # noqa: E501
    command = "python -m benchmarks.demo"
    table = Table(("", *TITLES.values()), rows)
    return Section("demo", "D-OPSD against SFT", command, None, table, (closed, *NOTES))


def _mean_and_std(figure: Mapping[str, float]) -> str:
    mean = f"{figure['mean']:.0f}" if figure["mean"] >= 100 else f"{figure['mean']:.3g}"
    return f"{mean} ± {figure['std']:.2g}" if "std" in figure else mean


def main() -> None:
    """Runs the demo and records its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "demo")
    parser.add_argument("--jobs", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--training-seeds", type=int, default=3, help="training runs per method")
    args = parser.parse_args()
    folder = on_this_model(args.output)
    if not (folder / "report.json").exists():
        command = [sys.executable, "-m", "dopsd_core", "demo", "--output", str(folder)]
        subprocess.run([*command, "--jobs", str(args.jobs), "--seeds", str(args.training_seeds)], check=True)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for name in IMAGES:
        shutil.copyfile(folder / name, ROOT / "docs" / name)
    record(measured_here(section(report, args.training_seeds), f"{args.jobs} jobs"), RESULTS)


if __name__ == "__main__":
    main()
