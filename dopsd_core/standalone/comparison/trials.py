"""One trial: a method trained on one concept with one seed, scored; and its record on disk.

A finished trial is a JSON file, and is not run again while everything that decides it is the same. A killed one resumes
from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from safetensors.torch import save as format_safetensors

from ...config import TrainConfig
from ...demo.world import IMAGE_SIZE
from ...families import Z_IMAGE
from ...files.atomic import write_atomic
from ...trainable import Trainable
from ...training.log import LOG_NAME, read_log
from ...training.run_folder import CHECKPOINTS_NAME, CLASS_IMAGES_NAME, CONFIG_NAME
from ...training.trainer import NoCallbacks
from ..demo import Demo
from ..evaluate import Samples
from .methods import TEACHER, UNTOUCHED, Method
from .work import CountedDenoiser

Regime = Literal["steps", "time", "error", "work"]
"""What is equal: optimizer steps, wall time, the concept error at which training stops, or the work in FLOPs."""

PARTS = (0.25, 0.5, 1.0)
"""Shares of the work at which the gap is measured, and before the end also the concept error."""

_CHECKED_PROMPTS = 16
_CHECK_SEED = 50_000  # other noise than the scores', which would favour a lucky stop


@dataclass(frozen=True)
class Trial:
    """What to run.

    Attributes:
        method: the method.
        concept: seed of the concept.
        seed: of training and images.
        regime: what is equal to the other methods.
        steps: optimizer steps; for "error" at most.
        level: for "error", the concept error at which training stops.
        check_every: for "error", steps between two measurements of it.
        work: for "work", where training stops, in forwards of the untouched model on one image.
    """

    method: Method
    concept: int
    seed: int
    regime: Regime = "steps"
    steps: int = 60
    level: float = 0.0
    check_every: int = 10
    work: int = 0

    @property
    def name(self) -> str:
        """Names its files."""
        return f"{self.method.name}-{self.regime}-concept{self.concept}-seed{self.seed}"

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return self.method.name not in (UNTOUCHED, TEACHER)

    def config(self) -> TrainConfig:
        """The configuration of its run."""
        config = self.method.config(self.steps, self.seed)
        if self.regime == "work":  # previews for the weights after each step; a warm-up would take more of fewer steps
            return config.replace(preview_every=1, schedule=config.schedule.replace(warmup=0))
        return config.replace(preview_every=self.check_every) if self.regime == "error" else config

    def digest(self, fingerprints: str) -> str:
        """Changes with all that decides the result; fingerprints: of the demo's models."""
        facts = [self.name, fingerprints, self.method.undistilled, self.level, self.check_every]
        facts += [self.work] if self.regime == "work" else []
        text = json.dumps([*facts, json.loads(self.config().to_json()) if self.is_trained else None], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        method: name of the method.
        concept: seed of the concept.
        seed: seed of the run.
        regime: as in `Trial`.
        steps: optimizer steps done.
        seconds: wall time of these steps and of class images, without measurements.
        drawing_seconds: wall time of class images.
        step_seconds: median wall time of a step.
        reached: whether the concept error reached its level; True for other regimes.
        scores: the scores by name.
        forwards: its work in forwards of the untouched model on one image, a backward counted by its FLOPs.
        digest: of the trial.
    """

    method: str
    concept: int
    seed: int
    regime: str
    steps: int
    seconds: float
    drawing_seconds: float
    step_seconds: float
    reached: bool
    scores: Mapping[str, float]
    digest: str
    forwards: float = 0.0


def saved_outcome(trial: Trial, folder: Path, fingerprints: str, needs_images: bool = False) -> Outcome | None:
    """The outcome of a trial that was done; None if there is none, or if it was another trial."""
    path = _outcome_path(trial, folder)
    if not path.exists() or (needs_images and not _images_path(trial, folder).exists()):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        outcome = Outcome(**{field.name: values[field.name] for field in fields(Outcome)})
    except (ValueError, KeyError, TypeError):
        return None
    return outcome if outcome.digest == trial.digest(fingerprints) else None


def run_trial(trial: Trial, demo: Demo, folder: Path, fingerprints: str, keeps_images: bool = False) -> Outcome:
    """Trains and scores; writes the outcome, and the images if they are kept.

    Args:
        demo: of the trial's concept.
        folder: of the comparison.
        fingerprints: of the demo's models.
        keeps_images: whether the contact sheet shows it.
    """
    watcher = _watcher(trial, demo)
    if trial.is_trained:
        name = trial.name
        make_room(trial, demo.output / "runs" / name)
        lora = demo.train(name, trial.config(), watcher, undistilled=trial.method.undistilled, counted=watcher.counted)
        samples = demo.samples(trial.seed, lora)
        run = demo.output / "runs" / name
        seconds = [row.seconds for row in read_log(run / LOG_NAME) if row.seconds is not None]
    else:
        samples, run, seconds = demo.samples(trial.seed), None, []
        if trial.method.name == TEACHER:
            samples = demo.taught(trial.seed, samples)
    outcome = Outcome(
        method=trial.method.name, concept=trial.concept, seed=trial.seed, regime=trial.regime, steps=len(seconds),
        seconds=sum(seconds) + watcher.drawing, drawing_seconds=watcher.drawing,
        step_seconds=float(torch.tensor(seconds).median()) if seconds else 0.0,
        reached=watcher.reached, scores=watcher.with_measured(asdict(demo.score(samples))),
        digest=trial.digest(fingerprints), forwards=watcher.forwards,
    )  # fmt: skip
    if keeps_images:
        _save_images(_images_path(trial, folder), samples)
    path = _outcome_path(trial, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(asdict(outcome), indent=2) + "\n").encode())
    if run is not None:  # the LoRA and the log stay
        for name in (CHECKPOINTS_NAME, CLASS_IMAGES_NAME):
            shutil.rmtree(run / name, ignore_errors=True)
    return outcome


def make_room(trial: Trial, run: Path) -> None:
    """Removes the folder of a run that cannot be resumed as this trial.

    That is one with other settings, such as steps in equal time that followed other timings; and for equal work any, as
    what a killed one has counted is lost.
    """
    config = run / CONFIG_NAME
    is_other = config.exists() and config.read_text(encoding="utf-8") != trial.config().to_json()
    if trial.regime == "work" or is_other:
        shutil.rmtree(run, ignore_errors=True)


def saved_images(trial: Trial, folder: Path) -> Samples:
    """The images that `run_trial` kept, [n, 3, h, w] in [0, 1]."""
    tensors = load_file(_images_path(trial, folder))
    return Samples(**{field.name: tensors[field.name].float() / 255 for field in fields(Samples)})


def _save_images(path: Path, samples: Samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {field.name: getattr(samples, field.name).mul(255).round().byte() for field in fields(samples)}
    write_atomic(path, format_safetensors(tensors))


def _outcome_path(trial: Trial, folder: Path) -> Path:
    return folder / "outcomes" / f"{trial.name}.json"


def _images_path(trial: Trial, folder: Path) -> Path:
    return folder / "images" / f"{trial.name}.safetensors"


class _Watcher(NoCallbacks):
    """Measures the concept error where training stops at a level, and the time of class images."""

    def __init__(self, trial: Trial, demo: Demo) -> None:
        self._trial, self._demo = trial, demo
        self._drawn_since: float | None = None
        self.drawing = 0.0
        self.reached = trial.regime != "error"
        self.counted: Any = None  # a `Denoiser`
        self.forwards = 0.0

    def with_measured(self, scores: dict[str, float]) -> dict[str, float]:
        """The scores at the end, and those that were measured on the way."""
        return scores

    def on_class_image(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self._drawn_since = now if self._drawn_since is None else self._drawn_since
        self.drawing = now - self._drawn_since

    def on_preview(self, step: int, adapters: Trainable) -> None:
        if self._trial.regime == "error" and not self.reached:
            self.reached = self._error(adapters) <= self._trial.level

    def _error(self, adapters: Trainable) -> float:
        trial, undistilled = self._trial, self._trial.method.undistilled
        return self._demo.concept_error(adapters, trial.config(), _CHECK_SEED, _CHECKED_PROMPTS, undistilled)

    def should_stop(self) -> bool:
        return self._trial.regime == "error" and self.reached


class _WorkWatcher(_Watcher):
    """Measures gap and concept error at parts of the work, and stops when all of it is done."""

    def __init__(self, trial: Trial, demo: Demo) -> None:
        super().__init__(trial, demo)
        self.counted = self._counted = CountedDenoiser(demo.model.denoiser)
        self._unit = _forward_flops(self._counted, demo)
        self._scores: dict[str, float] = {}

    def with_measured(self, scores: dict[str, float]) -> dict[str, float]:
        if self._trial.is_trained:
            return scores | self._scores
        gap = float(self._trial.method.name == UNTOUCHED)  # the teacher's own is 0
        errors = {error_name(part): scores["concept_error"] for part in PARTS[:-1]}
        return scores | dict.fromkeys(map(gap_name, PARTS), gap) | errors

    def on_preview(self, step: int, adapters: Trainable) -> None:
        self.forwards = self._counted.flops / self._unit
        for part in PARTS if step else ():
            if self.forwards >= part * self._trial.work and gap_name(part) not in self._scores:
                self._scores[gap_name(part)] = self._demo.relative_gap(adapters, _CHECK_SEED)
                if part < 1:
                    self._scores[error_name(part)] = self._error(adapters)

    def should_stop(self) -> bool:
        return self.forwards >= self._trial.work


def _forward_flops(counted: CountedDenoiser, demo: Demo) -> float:
    """Of a forward of the untouched model on one image of the first unseen prompt."""
    with torch.no_grad():
        return counted.cost(torch.zeros(1, *Z_IMAGE.latent_shape(IMAGE_SIZE, IMAGE_SIZE)), demo.conditions.trigger[:1])


def gap_name(part: float) -> str:
    """Of the score at a part of the work."""
    return f"gap at {part:g}"


def error_name(part: float) -> str:
    """Of the score at a part of the work."""
    return f"error at {part:g}"


def _watcher(trial: Trial, demo: Demo) -> _Watcher:
    return _WorkWatcher(trial, demo) if trial.regime == "work" else _Watcher(trial, demo)


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    """Everything that is averaged: the scores, and what they cost."""
    forwards = {"forwards": outcome.forwards} if outcome.regime == "work" else {}
    return {**outcome.scores, "steps": outcome.steps, **forwards, "seconds": outcome.seconds}
