"""Steps per second of one run on 1, 2 and 4 processes of this machine, on gloo: `python -m benchmarks.scaling`.

The demo model trains with 4 batches per optimizer step, which the processes share. Writes docs/scaling.json and the
table of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT, facts_of_machine, record_scaling
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.training.log import read_log

SIZES = (1, 2, 4)
_WARMUP = 3
"""First steps, which are not counted."""


@dataclass(frozen=True)
class Measured:
    """A run.

    Attributes:
        processes: number of processes.
        seconds: median of a step.
        efficiency: steps per second per process, relative to one process.
    """

    processes: int
    seconds: float
    efficiency: float


def measure(processes: int, steps: int, folder: Path) -> float:
    """The median seconds of a step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    output = folder / f"run{processes}"
    options = ("--steps", steps, "--batch-size", 2, "--grad-accumulation", 4, "--probe-every", 0, "--device", "cpu")
    words = ["train", folder / "photos", "--output", output, *options, "--checkpoint-every", 10 * steps, "--threads", 1]
    command = [sys.executable, *launcher, "-m", "dopsd_core", *map(str, words)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    found = [report.seconds for report in read_log(output / "train.jsonl") if report.seconds and report.step > _WARMUP]
    return statistics.median(found)


def table(results: Sequence[Measured]) -> str:
    """The results as Markdown."""
    rows = [f"| {r.processes} | {1 / r.seconds:.2f} | {r.efficiency:.0%} |" for r in results]
    return "\n".join(["| processes | steps/s | efficiency |", "|---|---|---|", *rows])


def main() -> None:
    """Measures and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of each run")
    args = parser.parse_args()
    facts = facts_of_machine()
    with tempfile.TemporaryDirectory() as place:
        write_dataset(make_concept(0), Path(place) / "photos")
        seconds = {size: measure(size, args.steps, Path(place)) for size in SIZES}
    results = [Measured(size, found, seconds[1] / found / size) for size, found in seconds.items()]
    record_scaling("scaling", facts, results, table(results))


if __name__ == "__main__":
    main()
