"""The loop that the training scripts share: draws, steps, weight average, log and checkpoints of one stage.

A stage ends by writing `<name>.safetensors`, the averaged weights; a stage with that file is done. Until then it may be
stopped at any time and resumes from its newest checkpoint with the same steps.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ...files.atomic import write_atomic
from .checkpoint import Checkpoints, append_log, part, with_prefix
from .optim import SharedMuon, zero_gradients
from .twins import Twins, WeightAverage, warmup_stable_decay

LossOf = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
"""(batch, generator) -> (loss, scalar; figures for the log)."""
_LOG_EVERY = 20


@dataclass(frozen=True)
class Stage:
    """How one stage is run.

    Attributes:
        name: of the checkpoints and of the result.
        folder: the work folder.
        steps: optimizer steps.
        batch: samples per worker and step.
        seed: base of the draws; a draw depends on it, the step and the worker.
        warmup: optimizer steps of linear warm-up.
        decay: share of the steps in which the learning rate falls to 0.
        average: decay of the weight average.
        minutes: the stage checkpoints and stops after this long, to be resumed; 0: never.
    """

    name: str
    folder: Path
    steps: int
    batch: int
    seed: int
    warmup: int = 50
    decay: float = 0.4
    average: float = 0.998
    minutes: float = 0.0

    @property
    def result(self) -> Path:
        """The file of the averaged weights, written at the end."""
        return self.folder / f"{self.name}.safetensors"


class StageRun:
    """One worker's run of a stage over `model`, of which `optimizer` holds the trained parameters."""

    def __init__(self, twins: Twins, stage: Stage, model: nn.Module, optimizer: SharedMuon) -> None:
        self.twins, self.stage, self.model, self.optimizer = twins, stage, model, optimizer
        self.parameters = [p for _, p in optimizer.named]
        self.average = WeightAverage(self.parameters, stage.average)
        self.checkpoints = Checkpoints(stage.folder, stage.name, twins)
        self.started, self.figures = time.monotonic(), dict[str, float]()

    def run(self, loss_of: LossOf) -> bool:
        """Trains to the end, or until the time is over; whether the stage is done."""
        stage, first = self.stage, self._resume()
        for step in range(first, stage.steps):
            generator = torch.Generator().manual_seed(stage.seed + step * self.twins.world + self.twins.rank)
            loss, figures = loss_of(stage.batch, generator)
            zero_gradients(self.parameters)
            loss.backward()
            figures["norm"] = self.twins.average_gradients(self.parameters, 1.0)
            self.optimizer.step(warmup_stable_decay(step, stage.steps, stage.warmup, stage.decay))
            self.average.update()
            self._log(step + 1, step + 1 - first, figures)
            over = stage.minutes > 0 and time.monotonic() - self.started > 60 * stage.minutes
            save_now, stop = self.twins.agreed((self.checkpoints.due(), over))
            if save_now or stop:
                self.checkpoints.save(step + 1, self._tensors())
            if stop and step + 1 < stage.steps:
                return False
        self.average.swap()
        if self.twins.rank == 0:
            state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
            write_atomic(stage.result, save(state))
        self.twins.barrier()
        return True

    def _resume(self) -> int:
        found = self.checkpoints.load()
        if found is None:
            return 0
        step, tensors = found
        self.model.load_state_dict(part(tensors, "model."))
        self.optimizer.load_tensors(part(tensors, "optimizer."))
        self.average.load({int(name): value for name, value in part(tensors, "average.").items()}, step)
        return step

    def _tensors(self) -> dict[str, Tensor]:
        """Rank 0 saves what is equal on all workers, every worker its share of Muon's state."""
        shared = self.twins.rank == 0
        out = with_prefix("optimizer.", self.optimizer.tensors(shared=shared))
        if shared:
            out |= with_prefix("model.", self.model.state_dict())
            out |= {f"average.{i}": value for i, value in enumerate(self.average.values)}
        return out

    def _log(self, step: int, here: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self.figures[key] = 0.96 * self.figures.get(key, value) + 0.04 * value
        if self.twins.rank == 0 and (step % _LOG_EVERY == 0 or step == self.stage.steps):
            speed = here * self.stage.batch * self.twins.world / (time.monotonic() - self.started)
            words = {key: round(value, 4) for key, value in self.figures.items()}
            line = {"stage": self.stage.name, "step": step, "of": self.stage.steps, "rows_per_second": round(speed, 1)}
            append_log(self.stage.folder, {**line, "workers": self.twins.world, "machine": platform.node(), **words})
