"""One run: its parts, its state between two steps, and its folder.

The folder holds `config.json`, `train.jsonl`, `checkpoints/` and `lora.safetensors`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..adapters.lora_import import lora_digest
from ..conditioning.encode import DualCondition
from ..config import TrainConfig, changes_that_forbid_resuming
from ..denoiser import Denoiser
from ..families import get_family
from ..files.atomic import write_atomic
from ..files.lock import FolderLock
from ..objectives import ObjectiveInputs, ObjectiveOutput
from ..optimizers import evaluating, start_training
from .checkpoint import Checkpoint, StateError, flatten_state, load_checkpoint, save_checkpoint, unflatten_state
from .log import LOG_NAME, Gaps, RunLog, StepReport, mean_metrics
from .probe import Probe
from .rng import DataOrder, draw_noise, draw_variant, make_generator
from .training_set import TrainingSet, latent_shape, pair_to

log = logging.getLogger("dopsd")

CONFIG_NAME = "config.json"
LORA_NAME = "lora.safetensors"
CHECKPOINTS_NAME = "checkpoints"


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; `step` is the optimizer step that was being made, from 1."""

    def __init__(self, step: int, what: str, value: float) -> None:
        super().__init__(
            f"the {what} of step {step} is {value}; the state before it is kept. "
            "Lower lr, or raise warmup; on half precision load the model in a wider dtype"
        )
        self.step, self._facts = step, (step, what, value)

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[int, str, float]]:
        return NonFiniteError, self._facts  # so that it survives the way out of a worker process


class Run:
    """The parts of a run and their state between two steps."""

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        data: TrainingSet,
        folder: Path,
        facts: Mapping[str, str] | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.denoiser, self.data, self.folder = config, denoiser, data, folder
        self._facts = dict(facts or {})
        self.step = 0
        self.start: Gaps | None = None
        self.last: Gaps | None = None
        self.is_between_steps = True
        self._log: RunLog | None = None
        self._lock = FolderLock(folder)
        self._fingerprint = data.fingerprint()
        wants_anchors = config.objective.wants_anchors
        self._anchors = [anchor.to(denoiser.device) for anchor in data.anchors] if wants_anchors else []
        self.adapters = config.adapter.build(denoiser, config.teacher, config.seed)
        self._initial = lora_digest(initial) if initial else ""
        self._start_state = config.adapter.start_state(initial, self.adapters.state()) if initial else None
        self.optimizer = config.optimizer.build(self.adapters.parameters())
        start_training(self.optimizer)
        self.probe = Probe(config, denoiser, self.adapters, data)
        repeats = tuple(example.repeats for example in data.examples)
        self.order = DataOrder(data.shapes(), repeats, config.batch_size, config.seed)

    def open(self, resume: bool) -> None:
        """Takes the folder, loads its newest checkpoint, if there is one, and writes the configuration down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        checkpoint = load_checkpoint(self.folder / CHECKPOINTS_NAME)
        if checkpoint is not None:
            if not resume:
                raise StateError(f"{self.folder} holds a run already; resume it, or choose another folder")
            self._load(checkpoint)
        elif self._start_state is not None:
            self._set_weights(self._start_state, self._start_state)
        self._start_state = None
        write_atomic(self.folder / CONFIG_NAME, self.config.to_json().encode())
        self._log = RunLog(self.folder / LOG_NAME, self.step if checkpoint else -1)

    def close(self) -> None:
        """Closes the log and gives the folder back."""
        if self._log is not None:
            self._log.close()
        self._lock.release()

    def measure_start(self) -> StepReport:
        """Measures the gap before training."""
        self.start = self.last = self._measured()
        if self.start.train < 1e-6:
            log.warning("teacher and student agree before training: the teacher sees nothing to teach")
        relative, heldout = self.start.relative_to(self.start)
        metrics = {"gap": self.start.train}
        report = StepReport(step=0, metrics=metrics, relative_gap=relative, heldout_relative_gap=heldout)
        self._append(report)
        return report

    def make_step(self) -> StepReport:
        """One optimizer step: accumulate, check, clip, step, teacher, probe, log."""
        began = time.perf_counter()
        config = self.config
        rate = config.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        outputs = [self._backward(micro) for micro in range(config.grad_accumulation)]
        grad_norm = self._check_and_clip(outputs)
        self.is_between_steps = False
        self.optimizer.step()
        self.adapters.update_teacher()
        self.step += 1
        self.is_between_steps = True
        seconds = time.perf_counter() - began
        report = self._report(outputs, rate, grad_norm, seconds)
        self._append(report)
        return report

    def save(self) -> Path:
        """Writes a checkpoint of the state between two steps.

        Raises:
            NonFiniteError: the weights are not finite; nothing is written then.
        """
        if not self._is_finite():
            raise NonFiniteError(self.step, "LoRA's weights after the optimizer", math.nan)
        if self._log is not None:
            self._log.sync()
        tensors, values = flatten_state(self.optimizer.state_dict()["state"])
        facts = {
            "config": self.config.to_json(),
            "data": self._fingerprint,
            "initial": self._initial,
            "optimizer": values,
            "start": None if self.start is None else dataclasses.astuple(self.start),
            "last": None if self.last is None else dataclasses.astuple(self.last),
        }
        checkpoint = Checkpoint(
            self.step, self.adapters.state("student"), self.adapters.state("teacher"), tensors, facts
        )
        return save_checkpoint(self.folder / CHECKPOINTS_NAME, checkpoint, self.config.keep_checkpoints)

    def save_lora(self) -> Path:
        """Writes the student as a LoRA file."""
        path = self.folder / LORA_NAME
        metadata = self._facts | {
            "dopsd_version": __version__,
            "dopsd_dataset": self._fingerprint,
            "dopsd_config": self.config.to_json(),
            "dopsd_step": str(self.step),
            "dopsd_objective": self.config.objective.name,
            "dopsd_family": self.config.family,
        }
        if self._initial:
            metadata["dopsd_initial"] = self._initial
        prefix = get_family(self.config.family).key_prefix
        with evaluating(self.optimizer):
            self.config.adapter.save(path, self.adapters.state(), prefix, metadata)
        return path

    def save_before_leaving(self) -> None:
        """After an exception: saves the state if it is a good one, and never hides the exception."""
        if self.step == 0 or not self.is_between_steps or not self._is_finite():
            return
        try:
            self.save()
            self.save_lora()
        except Exception:
            log.exception("the state of step %d could not be saved", self.step)

    def _measured(self) -> Gaps:
        with evaluating(self.optimizer):
            return self.probe.measure()

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.adapters.parameters())

    def _set_weights(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        self.adapters.load_state("student", student)
        if self.adapters.has_teacher:
            self.adapters.load_state("teacher", teacher)

    def _append(self, report: StepReport) -> None:
        if self._log is None:
            raise RuntimeError("the run is not open")
        self._log.append(report)

    def _backward(self, micro: int) -> ObjectiveOutput:
        config = self.config
        first = micro * config.batch_size
        indices = self.order.batch(self.step * config.grad_accumulation + micro)
        pairs = [self._draw_pair(index, first + offset) for offset, index in enumerate(indices)]
        shapes = [latent_shape(pair) for pair in pairs]
        device = self.denoiser.device
        return config.objective.backward(
            ObjectiveInputs(
                denoiser=self.denoiser,
                adapters=self.adapters,
                pairs=[pair_to(pair, device) for pair in pairs],
                noise=draw_noise(config.seed, self.step, first, shapes).to(device),
                sigmas=get_family(config.family).grid(config.rollout_steps, shapes[0]),
                generator=make_generator(config.seed, "objective", self.step, micro),
                anchors=self._anchors,
                loss_scale=1 / config.grad_accumulation,
            )
        )

    def _draw_pair(self, index: int, sample: int) -> DualCondition:
        config = self.config
        example = self.data.examples[index]
        return self.data.pairs[draw_variant(example, config.caption_dropout, config.seed, self.step, sample)]

    def _check_and_clip(self, outputs: Sequence[ObjectiveOutput]) -> float:
        for output in outputs:
            if not math.isfinite(output.loss):
                raise NonFiniteError(self.step + 1, "loss", output.loss)
        limit = self.config.max_grad_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), limit))
        if not math.isfinite(grad_norm):
            raise NonFiniteError(self.step + 1, "gradient", grad_norm)
        return grad_norm

    def _report(self, outputs: Sequence[ObjectiveOutput], rate: float, grad_norm: float, seconds: float) -> StepReport:
        config = self.config
        relative, heldout = None, None
        if config.probe_every and (self.step % config.probe_every == 0 or self.step == config.steps):
            self.last = self._measured()
            if self.start is not None:
                relative, heldout = self.last.relative_to(self.start)
        told = [output for output in outputs if not output.is_anchor] or list(outputs)
        return StepReport(
            step=self.step,
            loss=_mean([output.loss for output in told]),
            metrics=mean_metrics([output.metrics for output in told]),
            relative_gap=relative,
            heldout_relative_gap=heldout,
            lr=rate,
            grad_norm=grad_norm,
            anchors=sum(output.is_anchor for output in outputs),
            seconds=seconds,
        )

    def _load(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        changed = changes_that_forbid_resuming(TrainConfig.from_json(facts["config"]), self.config)
        if facts["data"] != self._fingerprint:
            changed = (*changed, "the data set: its pictures, captions, encoder or their order")
        if facts.get("initial", "") != self._initial:
            changed = (*changed, "the LoRA that it started from")
        if changed:
            raise StateError(
                f"{self.folder} holds another run; choose another folder, or undo what changed: {'; '.join(changed)}"
            )
        if checkpoint.step > self.config.steps:
            raise StateError(f"{self.folder} is at step {checkpoint.step} already; raise steps ({self.config.steps})")
        self._set_weights(checkpoint.lora, checkpoint.teacher)
        saved = unflatten_state(checkpoint.optimizer, facts["optimizer"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved})
        self.step = checkpoint.step
        self.start = Gaps(*facts["start"]) if facts["start"] else None
        self.last = Gaps(*facts["last"]) if facts["last"] else None
        log.info("going on with %s at step %d", self.folder, self.step)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
