"""Runs the demo's jobs in parallel, each in its own process with one thread.

For networks this small, two threads are hardly faster than one, but two processes are twice as fast.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..demo.concept import make_concept
from ..demo.model_files import JUDGE_FILE, WEIGHTS
from ..training.trainer import NoCallbacks
from .evaluate import Samples, Scores
from .judge import load_judge
from .memory import peak_rss_mb
from .workers import end_with_parent

if TYPE_CHECKING:
    from .demo import Demo

Progress = Callable[[str, float], None]
"""(description, work done since the last call)."""

_Result = tuple[list[tuple[Scores, list[Any]]], Path | None, int, float]

_SAMPLES = 16.0  # cost of a set of images, in D-OPSD steps


@dataclass(frozen=True)
class Job:
    """Samples a model trained with `config`, or without one the untouched model and its teacher.

    Attributes:
        seed: seed of the images.
        config: configuration of the training.
        method: name of the job, together with the seed.
    """

    seed: int
    config: TrainConfig | None = None
    method: str = "untouched"

    @property
    def name(self) -> str:
        """Name of the run's folder, shown in the progress bar."""
        return f"{self.method}-seed{self.seed}"

    @property
    def work(self) -> float:
        """Approximate duration in D-OPSD steps."""
        steps = 0.0 if self.config is None else self.config.steps * self.config.objective.relative_cost
        return steps + _SAMPLES


@dataclass(frozen=True, eq=False)
class Done:
    """The result of a job.

    Attributes:
        scores: scores of the images.
        samples: the images.
        taught: scores and images of the teacher, for a job without training.
        lora: the LoRA file, for a job with training.
    """

    scores: Scores
    samples: Samples
    taught: tuple[Scores, Samples] | None
    lora: Path | None


class JobRunner:
    """Runs jobs for one concept in `jobs` processes; a context manager.

    The returned samples are rounded to 8 bits, like images in a file.
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

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """Starts the jobs and yields their results, in order, each when it is there. Raises the first error of any."""
        return map(self._done, self._pool.map(_run, jobs))

    def _done(self, result: _Result) -> Done:
        found, lora, process, peak = result
        (scores, samples), *taught = [(scores, _from_bytes(images)) for scores, images in found]
        self.peaks[process] = max(peak, self.peaks.get(process, 0.0))
        return Done(scores, samples, taught[0] if taught else None, lora)

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
    end_with_parent()
    torch.set_num_threads(1)
    _worker = concept_seed, output, queue


@cache
def _demo(concept_seed: int, output: Path) -> Demo:
    """Created by the first job, not at process start, where an error would only be reported as a broken pool."""
    # Here, as the libraries of the networks take seconds to import, and the process that waits for the jobs needs none.
    from .demo import Demo
    from .hosts.demo import load_demo_model

    return Demo(load_demo_model(), load_judge(WEIGHTS / JUDGE_FILE), make_concept(concept_seed), output)


def _to_bytes(samples: Samples) -> list[Any]:
    """8-bit arrays: tensors would be sent as shared memory, which ends with the process."""
    return [part.mul(255).round().byte().numpy() for part in vars(samples).values()]


def _from_bytes(arrays: list[Any]) -> Samples:
    return Samples(*(torch.from_numpy(array).float() / 255 for array in arrays))


def _run(job: Job) -> _Result:
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
