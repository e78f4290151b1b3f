"""The training loop: it orders the steps and owns no maths.

    result = train(config, denoiser, TrainingSet(pairs), "runs/dog", callbacks)

A run lives in one folder: `config.json`, `train.jsonl`, `checkpoints/`, and the LoRA so far or in the end,
`lora.safetensors`. Called again for the same folder it resumes where it stopped. On a CPU it then ends bit-identical
to a run that was never stopped; on a GPU it does so with `TrainConfig.deterministic`, and else within rounding, because
the fastest backward of attention adds in any order there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..config import ConfigError, TrainConfig
from ..denoiser import Denoiser
from ..files.disk import DiskError
from ..memory.activation_checkpointing import checkpointed
from ..optimizers import evaluating
from ..trainable import Trainable
from .determinism import deterministic_algorithms, obstacle
from .log import Gaps, StepReport
from .run import NonFiniteError, Run
from .run_folder import check_run_folder
from .training_set import TrainingSet

__all__ = ["Callbacks", "NoCallbacks", "NonFiniteError", "TrainResult", "TrainingSet", "check_run", "train"]


class Callbacks(Protocol):
    """What a host is told and asked. An exception from any of them ends the run after saving its state."""

    def on_step(self, report: StepReport) -> None:
        """After each optimizer step; once with step 0 before training when the gap is measured."""
        ...

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """At step 0, every `preview_every` steps, after the last, and where a run is resumed with another held-out
        pair; `adapters.use(...)` chooses who samples."""
        ...

    def should_stop(self) -> bool:
        """Asked before each step; True saves checkpoint and LoRA and ends the run."""
        ...


class NoCallbacks:
    """Callbacks that do nothing; a base class for those that do one thing."""

    def on_step(self, report: StepReport) -> None:
        """Nothing."""

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Nothing."""

    def should_stop(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        stopped: the host asked to stop before the last step.
        lora_path: the LoRA file for ComfyUI and diffusers.
        checkpoint_path: the checkpoint to resume from.
        start_gaps, end_gaps: gaps to the teacher on the fixed noise, before training and last measured; None without.
    """

    step: int
    stopped: bool
    lora_path: Path
    checkpoint_path: Path
    start_gaps: Gaps | None
    end_gaps: Gaps | None


def train(
    config: TrainConfig,
    denoiser: Denoiser,
    data: TrainingSet,
    run_dir: str | Path,
    callbacks: Callbacks | None = None,
    *,
    resume: bool = True,
    facts: Mapping[str, str] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    checkpoint_blocks: int = 0,
    host_bytes: int = 0,
) -> TrainResult:
    """Trains a LoRA, or resumes the run in `run_dir`, and leaves the denoiser as it was.

    Args:
        resume: whether a run that is in `run_dir` may be continued; if not, finding one is an error.
        facts: what else the LoRA's header shall tell: base model, trigger, ... A run goes on only with a model of the
            same `dopsd_base_fingerprint`, where that is given.
        initial: the LoRA that a new run starts from, for student and teacher: folded tensors under part names, of the
            configuration's rank or less (`lora_import`). A "frozen" teacher stays the base. A run goes on only with
            the one that it started from.
        checkpoint_blocks: how many blocks recompute in the backward, for less memory (`activation_checkpointing.py`);
            the result is the same.
        host_bytes: what the callbacks will write to the disk of `run_dir`, which is counted before training.

    Raises:
        ConfigError: the configuration does not fit the data or this machine.
        DiskError: `run_dir` cannot be written or has no room, before training or, if something else filled the disk,
            later; the message says what is kept. Room for one more save is held during the run, so that no step is
            lost to others.
        ValueError: `initial` does not fit the configuration.
        StateError: the run in `run_dir` is another one (the message names what differs), or all of it is damaged.
        FolderInUse: another run is working in `run_dir`.
        NonFiniteError: with its step; checkpoint and LoRA of the step before are saved.
    """
    callbacks = callbacks or NoCallbacks()
    check_run(config, denoiser, data, run_dir, host_bytes)
    with torch.inference_mode(False), torch.enable_grad():  # ComfyUI calls in inference mode
        run = Run(config, denoiser, data, Path(run_dir), facts, initial)
        try:
            run.open(resume)
            with run.adapters.attached(), checkpointed(denoiser.blocks(), checkpoint_blocks):
                stopped = _loop(run, callbacks)
            lora_path, checkpoint_path = run.save_all()
            return TrainResult(run.step, stopped, lora_path, checkpoint_path, run.start, run.last)
        except DiskError as error:
            run.save_before_leaving()
            raise DiskError(f"{error}; {run.folder.kept()}", error.is_full) from error
        except BaseException:
            run.save_before_leaving()
            raise
        finally:
            run.close()


def check_run(
    config: TrainConfig, denoiser: Denoiser, data: TrainingSet, run_dir: str | Path, host_bytes: int = 0
) -> None:
    """Checks all that can be checked before any work on the device; `train` begins with it. Leaves nothing behind.

    Raises:
        ConfigError, DiskError, ValueError: as `train` does.
    """
    _check_data(config, data)
    if config.deterministic and (problem := obstacle(denoiser.device)):
        raise ConfigError((problem,))
    check_run_folder(config, denoiser, Path(run_dir), host_bytes)


def _loop(run: Run, callbacks: Callbacks) -> bool:
    """Steps until the last one or a stop; True when stopped."""
    config = run.config
    is_other_heldout = run.meet_heldout()
    if run.step == 0 and run.start is None and config.probe_every:
        callbacks.on_step(run.measure_start())
    if config.preview_every and (run.step == 0 or is_other_heldout):  # it comes with other prompts to draw
        _preview(run, callbacks)
    while run.step < config.steps:
        if callbacks.should_stop():
            return True
        with deterministic_algorithms(config.deterministic):
            report = run.make_step()
        callbacks.on_step(report)
        if run.step == config.steps:
            run.save_all()
        elif run.step % config.checkpoint_every == 0:
            run.save()
            run.folder.hold_room()
        if config.preview_every and (run.step % config.preview_every == 0 or run.step == config.steps):
            _preview(run, callbacks)
    return False


def _preview(run: Run, callbacks: Callbacks) -> None:
    with evaluating(run.optimizer):
        callbacks.on_preview(run.step, run.adapters)


def _check_data(config: TrainConfig, data: TrainingSet) -> None:
    problems = []
    if config.objective.wants_anchors and not data.anchors:
        problems.append("anchor_probability is above 0, but there are no anchor captions; give some, or set it to 0")
    if config.caption_dropout > 0 and any(example.dropped is None for example in data.examples):
        problems.append("caption_dropout is above 0, but no empty caption was encoded; encode one, or set it to 0")
    if problems:
        raise ConfigError(problems)
