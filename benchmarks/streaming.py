"""Peak memory of a training that streams its dataset, at several numbers of images: `python -m benchmarks.streaming`.

Synthetic shards with tiny tensors and a network of three Linears: what is measured is what the trainer keeps per image.
Each number is measured in a process of its own. Writes docs/streaming.json and the table of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import ROOT, facts_of_machine, record_scaling
from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.data.encoding_plan import Example
from dopsd_core.families import Z_IMAGE
from dopsd_core.shards.encoding import Encoding
from dopsd_core.shards.finish import begin, finish
from dopsd_core.shards.index import Index, shard_name
from dopsd_core.shards.reader import Shards
from dopsd_core.shards.rows import ShardRows
from dopsd_core.shards.streamed_set import stream
from dopsd_core.shards.writer import EncodedImages, write_shard
from dopsd_core.standalone.memory import peak_rss_mb
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import TrainingSet
from tests.tiny import make_config
from tests.toy_denoiser import CHANNELS, FEATURES, TinyDenoiser

SIZES = (1000, 10000, 50000)
SHARD = 250
TOKENS = 512
"""Tokens of the teacher's features, so that the conditions of 50,000 images have half a gigabyte."""


@dataclass(frozen=True)
class Measured:
    """A run of some steps.

    Attributes:
        images: number of images.
        gigabytes: size of the shards.
        seconds: of the whole run, with opening the dataset.
        peak_mb: peak resident memory of the process, in 10^6 bytes.
        in_memory_mb: the same where all pairs are loaded first.
    """

    images: int
    gigabytes: float
    seconds: float
    peak_mb: float
    in_memory_mb: float


def make_image(number: int) -> DualCondition:
    """A pair with random features and latents of two shapes."""
    generator = torch.Generator().manual_seed(number)
    student, teacher = (torch.randn(tokens, FEATURES, generator=generator) for tokens in (8, TOKENS))
    latent = torch.randn(CHANNELS, *((2, 3), (3, 2))[number % 2], generator=generator)
    key = f"{number:064x}"
    return DualCondition(Condition(student), Condition(teacher), latent, f"image {number} of a large dataset", key)


def write(folder: Path, images: int) -> None:
    """Writes shards with as many images."""
    encoding = Encoding("synthetic", "z_image", "vlm", "", "keep", "", 64, 16)
    begin(folder, encoding, "synthetic")
    for part in range(images // SHARD):
        pairs = [make_image(part * SHARD + number) for number in range(SHARD)]
        encoded = EncodedImages(pairs, [Example((number,)) for number in range(SHARD)])
        write_shard(folder, shard_name(part, 0), encoded, Z_IMAGE, ShardRows(encoding.digest(), "", True))
    finish(folder, encoding, "synthetic", images // SHARD)


def run(folder: Path, output: Path, steps: int, in_memory: bool) -> tuple[float, float]:
    """Trains some steps on the shards: (seconds, peak memory in MB)."""
    began = time.perf_counter()
    data: TrainingSet = stream(Shards(folder, Index.read(folder)))
    if in_memory:
        data = TrainingSet(list(data.pairs), examples=list(data.examples))
    train(make_config(steps=steps, batch_size=4, probe_every=0, checkpoint_every=steps), TinyDenoiser(), data, output)
    return time.perf_counter() - began, peak_rss_mb()


def measure(images: int, steps: int, place: Path) -> Measured:
    """Writes shards with as many images and trains on them in two processes, one after the other."""
    folder = place / f"shards{images}"
    write(folder, images)
    found = []
    for in_memory in (False, True):
        words = ["--run", folder, "--output", place / f"run{images}{in_memory}", "--steps", steps]
        command = [sys.executable, "-m", "benchmarks.streaming", *map(str, words), *["--in-memory"] * in_memory]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        found.append(json.loads(result.stdout.splitlines()[-1]))
    size = sum(shard.size for shard in Index.read(folder).shards) / 1e9
    return Measured(images, size, found[0][0], found[0][1], found[1][1])


def table(results: Sequence[Measured], steps: int) -> str:
    """The results as Markdown."""
    rows = [
        f"| {r.images:,} | {r.gigabytes:.2f} GB | {r.peak_mb:.0f} MB | {r.in_memory_mb:.0f} MB | {r.seconds:.0f} |"
        for r in results
    ]
    head = f"| images | shards | peak memory | the same, all in memory | seconds for {steps} steps |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def main() -> None:
    """Measures and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        sys.stdout.write(json.dumps(run(args.run, args.output, args.steps, args.in_memory)) + "\n")
        return
    facts = {**facts_of_machine(), "steps": args.steps}
    with tempfile.TemporaryDirectory() as place:
        results = [measure(images, args.steps, Path(place)) for images in args.sizes]
    record_scaling("streaming", facts, results, table(results, args.steps))


if __name__ == "__main__":
    main()
