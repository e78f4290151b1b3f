"""The demo's runs, several at a time: each in a process of its own with one thread.

On networks this small two threads are hardly faster than one, two processes are twice as fast.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..demo.concept import make_concept
from ..demo.model_files import JUDGE_FILE, WEIGHTS
from ..training.trainer import NoCallbacks
from .demo import Demo
from .evaluate import Samples, Scores
from .hosts.demo import load_demo_model
from .judge import load_judge
from .memory import peak_rss_mb

Progress = Callable[[str, float], None]
"""(what is being done, work done since the last call)."""

_SAMPLES = 16.0  # cost of a set of images, in steps of D-OPSD


@dataclass(frozen=True)
class Job:
    """Images of a model trained by `config`; without one, of the untouched model and of its teacher.

    Attributes:
        seed: of the training and of the images.
        config: of the training.
        method: what the job is called, together with its seed.
    """

    seed: int
    config: TrainConfig | None = None
    method: str = "untouched"

    @property
    def name(self) -> str:
        """The run's folder and what the progress bar calls it."""
        return f"{self.method}-seed{self.seed}"

    @property
    def work(self) -> float:
        """About how long it takes, in steps of D-OPSD."""
        steps = 0.0 if self.config is None else self.config.steps * self.config.objective.relative_cost
        return steps + _SAMPLES


@dataclass(frozen=True, eq=False)
class Done:
    """What a job found.

    Attributes:
        scores: of its images.
        samples: the images.
        taught: the same of the teacher, of an untouched job.
        lora: the file, of a training job.
    """

    scores: Scores
    samples: Samples
    taught: tuple[Scores, Samples] | None
    lora: Path | None


class JobRunner:
    """Runs jobs on one concept in `jobs` processes; a context manager.

    The samples that come back are rounded to 8 bits, as images in a file would be.
    """

    def __init__(self, concept_seed: int, output: Path, jobs: int, progress: Progress) -> None:
        context = multiprocessing.get_context("spawn")
        self._manager = context.Manager()
        self._queue: Any = self._manager.Queue()
        self._listener = threading.Thread(target=self._listen, args=(progress,), daemon=True)
        self._listener.start()
        self._pool = ProcessPoolExecutor(jobs, context, _start, (concept_seed, output, self._queue))
        self.peaks: dict[int, float] = {}

    def __enter__(self) -> JobRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._queue.put(None)
        self._listener.join()
        self._manager.shutdown()

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        """Every job's result, in order. The first error of any of them is raised here."""
        results = []
        for found, lora, process, peak in self._pool.map(_run, jobs):
            (scores, samples), *taught = [(scores, _from_bytes(images)) for scores, images in found]
            self.peaks[process] = max(peak, self.peaks.get(process, 0.0))
            results.append(Done(scores, samples, taught[0] if taught else None, lora))
        return results

    def _listen(self, progress: Progress) -> None:
        while (message := self._queue.get()) is not None:
            progress(*message)


class _ProgressCallbacks(NoCallbacks):
    def __init__(self, job: Job, queue: Any) -> None:
        self._job, self._queue = job, queue

    def on_step(self, report) -> None:
        config = self._job.config
        if config is not None and report.step:
            gap = "" if report.relative_gap is None else f", gap {report.relative_gap:.2f}"
            done = config.objective.relative_cost
            self._queue.put((f"{self._job.name} {report.step}/{config.steps}{gap}", done))


_worker: tuple[int, Path, Any] | None = None


def _start(concept_seed: int, output: Path, queue: Any) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = concept_seed, output, queue


@cache
def _demo(concept_seed: int, output: Path) -> Demo:
    """Made by the first job, not at the process's start, where an error would only be told as a broken pool."""
    return Demo(load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE), make_concept(concept_seed), output)


def _to_bytes(samples: Samples) -> list[Any]:
    """Arrays of 8 bits: tensors would travel as shared memory that dies with its process."""
    return [part.mul(255).round().byte().numpy() for part in vars(samples).values()]


def _from_bytes(arrays: list[Any]) -> Samples:
    return Samples(*(torch.from_numpy(array).float() / 255 for array in arrays))


def _run(job: Job) -> tuple[list[tuple[Scores, list[Any]]], Path | None, int, float]:
    if _worker is None:
        raise RuntimeError("the process was not started by JobRunner")
    concept_seed, output, queue = _worker
    demo = _demo(concept_seed, output)
    lora = None
    if job.config is not None:
        lora = demo.train(job.name, job.config, _ProgressCallbacks(job, queue))
    made = [demo.samples(job.seed, lora)]
    if job.config is None:
        made.append(demo.taught(job.seed, made[0]))
    queue.put((job.name, _SAMPLES))
    found = [(demo.score(samples), _to_bytes(samples)) for samples in made]
    return found, lora, os.getpid(), peak_rss_mb()
