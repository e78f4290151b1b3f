"""The training loop. It schedules the steps and contains no math.

    result = train(config, denoiser, TrainingSet(pairs), "runs/dog", callbacks)

All files of a run are in one folder: `config.json`, `train.jsonl`, `checkpoints/`, and the current or final LoRA,
`lora.safetensors`. Calling `train` again with the same folder resumes the run. On a CPU the result is bit-identical to
an uninterrupted run; on a GPU only with `TrainConfig.deterministic`, and otherwise up to rounding, because the fastest
attention backward sums in arbitrary order.
"""

from __future__ import annotations

import logging
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
from .nonfinite import NonFiniteError
from .run import Run
from .run_folder import check_run_folder
from .training_set import TrainingSet

__all__ = ["Callbacks", "NoCallbacks", "NonFiniteError", "TrainResult", "TrainingSet", "check_run", "train"]

log = logging.getLogger("dopsd")


class Callbacks(Protocol):
    """Hooks that a host implements. An exception in any of them ends the run after saving its state."""

    def on_step(self, report: StepReport) -> None:
        """Called after each optimizer step, and with step 0 before training if the gap is measured."""
        ...

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Called at step 0, every `preview_every` steps, after the last, and if a run is resumed with another held-out
        pair; `adapters.use(...)` selects the weights to sample with."""
        ...

    def should_stop(self) -> bool:
        """Called before each step; True saves checkpoint and LoRA and ends the run."""
        ...


class NoCallbacks:
    """Callbacks that do nothing; a base class."""

    def on_step(self, report: StepReport) -> None:
        """Does nothing."""

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Does nothing."""

    def should_stop(self) -> bool:
        """Never stops."""
        return False


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        step: optimizer steps done.
        stopped: whether the host stopped the run before the last step.
        lora_path: the LoRA file for ComfyUI and diffusers.
        checkpoint_path: the checkpoint to resume from.
        start_gaps: gaps to the teacher on fixed noise before training; None if not measured.
        end_gaps: the last measured gaps; None if not measured.
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
    """Trains a LoRA, or resumes the run in `run_dir`, and restores the denoiser on exit.

    Args:
        config: the configuration.
        denoiser: the frozen network.
        data: the encoded training pairs.
        run_dir: folder of the run.
        callbacks: hooks of the host.
        resume: whether to resume a run in `run_dir`; if False, it is an error if there is one.
        facts: extra metadata for the LoRA's header: base model, trigger, ... A run resumes only with the same
            `dopsd_base_fingerprint`, if that is given.
        initial: LoRA that a new run starts from, for student and teacher: folded tensors "<part>.lora_A.weight"
            [rank, in] and "<part>.lora_B.weight" [rows, rank], with at most the rank of the configuration
            (`lora_import`). A "frozen" teacher remains the base. A run resumes only with the same initial LoRA.
        checkpoint_blocks: number of blocks with gradient checkpointing, which saves memory and does not change the
            result (`activation_checkpointing.py`).
        host_bytes: bytes that the callbacks will write to the disk of `run_dir`, included in the check before training.

    Raises:
        ConfigError: the configuration does not fit the data or this machine.
        DiskError: `run_dir` is not writable or has not enough space, before training or, if other programs fill the
            disk, later; the message says what is saved. The space of the next save is reserved during the run.
        ValueError: `initial` does not fit the configuration.
        StateError: `run_dir` contains a different run (the message lists the differences), or is damaged.
        FolderInUse: another run is using `run_dir`.
        NonFiniteError: a loss, gradient or gap is not finite; checkpoint and LoRA of the previous step are saved.
    """
    callbacks = callbacks or NoCallbacks()
    check_run(config, denoiser, data, run_dir, host_bytes)
    for remark in config.objective.remarks():
        log.warning(remark)
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
    """Runs all checks that are possible before any work on the device, as `train` does first. Leaves nothing behind.

    Raises:
        ConfigError, DiskError, ValueError: as in `train`.
    """
    _check_data(config, data)
    if config.deterministic and (problem := obstacle(denoiser.device)):
        raise ConfigError((problem,))
    check_run_folder(config, denoiser, Path(run_dir), host_bytes)


def _loop(run: Run, callbacks: Callbacks) -> bool:
    """Runs the steps until the last one or a stop; returns True if stopped."""
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
        problems.append("anchor_probability is above 0, but there are no anchor captions; add some, or set it to 0")
    if config.caption_dropout > 0 and any(example.dropped is None for example in data.examples):
        problems.append("caption_dropout is above 0, but no empty caption was encoded; encode one, or set it to 0")
    if problems:
        raise ConfigError(problems)
