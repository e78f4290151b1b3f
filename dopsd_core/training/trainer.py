"""The training loop. It schedules the steps and contains no math.

    result = train(config, denoiser, TrainingSet(pairs), "runs/dog", callbacks)

All files of a run are in one folder: `config.json`, `train.jsonl`, `checkpoints/`, the current or final LoRA,
`lora.safetensors`, and those along the way, `loras/`. Calling `train` again with the same folder resumes the run. On a
CPU the result is bit-identical to an uninterrupted run; on a GPU only with `TrainConfig.deterministic`, and otherwise
up to rounding, because the fastest attention backward sums in arbitrary order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..adapters.adapter_set import AdapterSet
from ..compilation import compiled
from ..conditioning.cache import ConditionCache
from ..config import ConfigError, TrainConfig
from ..denoiser import Denoiser
from ..families import get_family
from ..files.disk import DiskError
from ..memory.activation_checkpointing import checkpointed
from ..memory.checkpoint_plan import Checkpointing
from ..optimizers import evaluating
from ..trainable import Trainable
from .class_images import ClassImages, given_images, plan_class_images
from .determinism import deterministic_algorithms, obstacle
from .health import Monitor, plateau_remark
from .log import Gaps, StepReport
from .nonfinite import NonFiniteError
from .regularisation import regularisation_remarks
from .run import Run
from .run_checks import check_data, check_network, check_share, idle_settings
from .run_folder import CLASS_IMAGES_NAME
from .saved_loras import is_due
from .training_set import TrainingSet
from .unseen_gap import BestStep
from .world import PeerError, Peers, World

__all__ = ["Callbacks", "NoCallbacks", "NonFiniteError", "PeerError", "TrainResult", "TrainingSet", "World"]
__all__ += ["check_run", "train"]

log = logging.getLogger("dopsd")

Ending = Literal["finished", "stopped", "plateau"]
"""How the loop ended: after all steps, by the host, or because the gap on the unseen prompt no longer fell."""


class Callbacks(Protocol):
    """Hooks that a host implements. An exception in any of them ends the run after saving its state."""

    def on_step(self, report: StepReport) -> None:
        """Called after each optimizer step, and with step 0 before training if the gap is measured."""
        ...

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Called at step 0, every `preview_every` steps, after the last, and if a run is resumed with another held-out
        pair; `adapters.use(...)` selects the weights to sample with. Called on every rank, so that they can share the
        images."""
        ...

    def on_best(self, best: BestStep) -> None:
        """Called when another step has the smallest gap on the unseen prompt, after its LoRA file is written if it has
        one; also at the start of a resumed run."""
        ...

    def on_class_image(self, done: int, total: int) -> None:
        """Called before the untouched model draws an image for the objective, with the number of those it has, and
        after the last one."""
        ...

    def should_stop(self) -> bool:
        """Called before each step and each class image; True saves checkpoint and LoRA and ends the run."""
        ...


class NoCallbacks:
    """Callbacks that do nothing; a base class."""

    def on_step(self, report: StepReport) -> None:
        """Does nothing."""

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Does nothing."""

    def on_best(self, best: BestStep) -> None:
        """Does nothing."""

    def on_class_image(self, done: int, total: int) -> None:
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
        at_plateau: whether `stop_at_plateau` ended it there.
        lora_path: the LoRA file for ComfyUI and diffusers.
        checkpoint_path: the checkpoint to resume from.
        start_gaps: gaps to the teacher on fixed noise before training; None if not measured.
        end_gaps: the last measured gaps; None if not measured.
        best: the step with the smallest gap on the unseen prompt, of those with a LoRA file if there are any; None if
            it was not measured, or on another rank than 0.
    """

    step: int
    stopped: bool
    lora_path: Path
    checkpoint_path: Path
    start_gaps: Gaps | None
    end_gaps: Gaps | None
    best: BestStep | None = None
    at_plateau: bool = False


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
    checkpointing: Checkpointing | int = 0,
    compiles: bool = False,
    keeps_casts: bool = True,
    host_bytes: int = 0,
    sample_steps: int | None = None,
    cache: ConditionCache | None = None,
    world: World | None = None,
) -> TrainResult:
    """Trains a LoRA, or resumes the run in `run_dir`, and restores the denoiser on exit.

    Args:
        config: the configuration.
        denoiser: the frozen network.
        data: the encoded training pairs.
        run_dir: folder of the run.
        callbacks: hooks of the host.
        resume: whether to resume a run in `run_dir`; if False, it is an error if there is one.
        facts: metadata for the LoRA's header. A run resumes only with the same `dopsd_base_fingerprint`, if given.
        initial: LoRA that a new run starts from, for student and teacher: folded "<part>.lora_A.weight" [rank, in] and
            "<part>.lora_B.weight" [rows, rank], with at most the configuration's rank (`lora_import`). A "frozen"
            teacher remains the base. A run resumes only with the same initial LoRA.
        checkpointing: gradient checkpointing, with the same result; a number is that of blocks that keep inputs alone.
        compiles: whether the blocks are compiled (`compilation.py`).
        keeps_casts: whether an adapter's weights are cast to the compute dtype once per step (`Footprint.casts`).
        host_bytes: bytes that the callbacks will write to `run_dir`, included in the check before training.
        sample_steps: steps in which the model draws class images (`class_images.py`); default: the family's.
        cache: keeps class images for other runs on the same model; default: a folder in `run_dir`.
        world: the processes that share the batches of each step, all of which call this function with equal arguments;
            default: this one. The result does not depend on their number, up to the order of additions.

    Raises:
        ConfigError: the configuration does not fit the data, this machine or the number of processes.
        DiskError: `run_dir` cannot be written or the disk is too full, before or in training; says what is saved.
        ValueError: `initial` does not fit the configuration.
        StateError: `run_dir` contains a different run (the message lists the differences), or is damaged.
        FolderInUse: another run is using `run_dir`.
        NonFiniteError: a loss, gradient or gap is not finite; checkpoint and LoRA of the previous step are saved.
        PeerError: another process of `world` failed or was lost.
    """
    callbacks, peers = callbacks or NoCallbacks(), Peers(world)
    with peers.ending_together(), torch.inference_mode(False), torch.enable_grad():  # ComfyUI calls in inference mode
        check_share(config, peers.world)
        peers.first(lambda: check_run(config, denoiser, data, run_dir, host_bytes))
        for remark in _remarks(config, data) if peers.world.rank == 0 else ():
            log.warning(remark)
        images = _class_images(config, data, Path(run_dir), facts or {}, sample_steps, cache)
        run = Run(config, denoiser, data, Path(run_dir), facts, initial, images, peers)
        if isinstance(run.adapters, AdapterSet):
            run.adapters.keep_casts(keeps_casts)
        return _to_the_end(run, callbacks, resume, checkpointing, compiles)


def check_run(
    config: TrainConfig, denoiser: Denoiser, data: TrainingSet, run_dir: str | Path, host_bytes: int = 0
) -> None:
    """Runs all checks that are possible before any work on the device, as `train` does first. Leaves nothing behind.

    Raises:
        ConfigError, DiskError, ValueError: as in `train`.
    """
    check_data(config, data)
    if config.deterministic and (problem := obstacle(denoiser.device)):
        raise ConfigError((problem,))
    check_network(config, denoiser, Path(run_dir), host_bytes)


def _to_the_end(
    run: Run, callbacks: Callbacks, resume: bool, checkpointing: Checkpointing | int, compiles: bool
) -> TrainResult:
    blocks = run.denoiser.blocks()
    try:
        run.open(resume)
        with run.adapters.attached(), compiled(blocks, compiles), checkpointed(blocks, checkpointing):
            ending = _loop(run, callbacks)
        lora_path, checkpoint_path = (run.peers.all(save)[0] for save in (run.save_lora, run.save))
        stopped, at_plateau = ending == "stopped", ending == "plateau"
        return TrainResult(run.step, stopped, lora_path, checkpoint_path, run.start, run.last, run.best, at_plateau)
    except DiskError as error:
        run.save_before_leaving()
        raise DiskError(f"{error}; {run.folder.kept()}", error.is_full) from error
    except BaseException:
        run.save_before_leaving()
        raise
    finally:
        run.close()


def _loop(run: Run, callbacks: Callbacks) -> Ending:
    """Runs the steps until the last one, a plateau or a stop."""
    config = run.config
    if run.step < config.steps and not _draw_class_images(run, callbacks):
        return "stopped"
    is_other_heldout = run.meet_heldout()
    if run.step == 0 and run.start is None and config.probe_every:
        callbacks.on_step(run.measure_start())
    if config.preview_every and (run.step == 0 or is_other_heldout):  # it comes with other prompts to draw
        _preview(run, callbacks)
    _find_best(run, callbacks)
    monitor = Monitor(config, run.folder.reports(), run.heldout_since)
    is_last = _ends_here(run, monitor)
    while not is_last:
        if any(run.peers.all(callbacks.should_stop)):
            return "stopped"
        with deterministic_algorithms(config.deterministic):
            report = run.make_step()
        callbacks.on_step(report)
        monitor.add(report)
        is_last = _ends_here(run, monitor)
        _save(run, is_last)
        if report.heldout_relative_gap is not None:
            _find_best(run, callbacks)
        for line in monitor.new_lines(run.best):
            log.warning(line)
        if config.preview_every and (run.step % config.preview_every == 0 or is_last):
            _preview(run, callbacks)
    return "finished" if run.step == config.steps else "plateau"


def _ends_here(run: Run, monitor: Monitor) -> bool:
    """Whether this was the last step, or the gap on the unseen prompt no longer falls, on every rank."""
    if run.step == run.config.steps:
        return True
    reason = run.peers.first(monitor.plateau) if run.config.stop_at_plateau else None
    if reason and run.peers.is_first:
        log.warning(reason)
    return reason is not None


def _save(run: Run, is_last: bool) -> None:
    """Writes what is due after a step."""
    config = run.config
    run.folder.require_saved()
    if keeps := is_due(config, run.step, is_last):  # before the checkpoint, after which it would not be written again
        run.save_lora_of_step()
    if is_last:
        run.save_all()
        return
    if run.step % config.checkpoint_every == 0:
        run.save_meanwhile()
    elif keeps:
        run.folder.hold_room()


def _find_best(run: Run, callbacks: Callbacks) -> None:
    before, run.best = run.best, run.folder.best(run.heldout_since)
    if run.best is not None and run.best != before:
        callbacks.on_best(run.best)


def _class_images(
    config: TrainConfig,
    data: TrainingSet,
    run_dir: Path,
    facts: Mapping[str, str],
    steps: int | None,
    cache: ConditionCache | None,
) -> ClassImages:
    model = facts.get("dopsd_base_fingerprint", "")
    if cache is None or not model:  # images of an unknown model belong to this run only
        cache = ConditionCache(run_dir / CLASS_IMAGES_NAME)
    planned = plan_class_images(config, data, model, steps or get_family(config.family).sample_steps)
    return ClassImages(planned, config.seed, cache, given_images(config, data))


def _draw_class_images(run: Run, callbacks: Callbacks) -> bool:
    """Returns False if the host stopped the run."""

    together = run.adapters.is_sharded

    def on_drawn(done: int, total: int) -> bool:
        callbacks.on_class_image(done, total)
        return not (any(run.peers.all(callbacks.should_stop)) if together else callbacks.should_stop())

    with deterministic_algorithms(run.config.deterministic):
        if together:
            return run.draw_class_images(on_drawn)
        if not run.peers.first(lambda: run.draw_class_images(on_drawn)):
            return False
        return run.peers.is_first or run.draw_class_images(lambda done, total: True)  # from the cache


def _preview(run: Run, callbacks: Callbacks) -> None:
    with evaluating(run.optimizer):
        callbacks.on_preview(run.step, run.adapters)


def _remarks(config: TrainConfig, data: TrainingSet) -> list[str]:
    return [
        *config.objective.remarks(),
        *regularisation_remarks(config, data),
        *idle_settings(config, bool(data.scales)),
        *filter(None, (plateau_remark(config, data.heldout is not None),)),
    ]
