"""A training run of a node: plan, folder, notes and watcher around the core's `train`, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
from safetensors import safe_open
from torch import Tensor

from ...dopsd_core.config import TrainConfig
from ...dopsd_core.families import get_family
from ...dopsd_core.training.checkpoint import read_checkpoint_lora
from ...dopsd_core.training.log import StepReport
from ...dopsd_core.training.trainer import NonFiniteError, TrainResult, check_run, train
from ...dopsd_core.training.training_set import latent_shape
from .denoiser import ComfyDenoiser, base_name, default_steps
from .distilled import warn_if_undistilled
from .identity import identity_of
from .memory_plan import MemoryPlan, OutOfMemory, advice, free_device_memory, is_out_of_memory, plan_memory
from .model_patches import unused_patches
from .paths import run_folder
from .presets import make_config, merged_settings, run_digest
from .previews import TILE, Painter, TrainingPreview, load_sheets
from .report import Notes
from .sockets import Conditions, TrainedLora
from .start import start_of
from .targets import require_blocks
from .unused import unused_settings
from .watcher import PREVIEWS_NAME, RunFacts, Watcher

_ROWS = 4  # of a preview sheet: source, before, teacher, student


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change, and what is kept where."""


@dataclass(frozen=True)
class Wanted:
    """What the node is asked for.

    Attributes:
        run_name: start of the run folder's name.
        memory: of `MEMORY_CHOICES`.
        preset: of `PRESETS`.
        chosen: as for `make_config`.
        unused: notes on settings that were given and decide nothing.
    """

    run_name: str
    memory: str
    preset: str
    chosen: Mapping[str, Any]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """config: with the memory plan's trades in it. sheets: of the previews, see `load_sheets`."""

    result: TrainResult
    config: TrainConfig
    folder: Path
    sheets: Tensor


def run_training(
    node: Any,
    model: Any,
    conditions: Conditions,
    vae: Any | None,
    wanted: Wanted,
    initial_lora: Mapping[str, Tensor] | None = None,
) -> FinishedRun:
    """Trains or resumes, in the folder that belongs to these settings, this model and this data.

    Raises:
        ConfigError: the settings do not fit.
        ValueError: a target matches nothing, or something outside the blocks.
        TrainingError: loss or gradient is not finite.
        DiskError: the folder cannot be written or has no room; before the model is loaded, if it is known by then.
        OutOfMemory: with what to change; the run's last checkpoint is kept and the GPU's memory given back.
    """
    notes = Notes()
    with notes.with_warnings():
        identity = identity_of(model)
    denoiser = ComfyDenoiser(model)
    config = make_config(wanted.preset, conditions.family, bool(conditions.data.anchors), wanted.chosen)
    require_blocks(denoiser, config.adapter)
    plan = plan_memory(wanted.memory, denoiser, conditions, config)
    config = plan.config
    start = start_of(initial_lora, denoiser, config, conditions.trigger, base_name(model))
    settings = merged_settings(wanted.preset, conditions.family, bool(conditions.data.anchors), wanted.chosen)
    marks = (conditions.data.fingerprint(), identity.digest, *start.identity)
    digest = run_digest(config, *marks, settings=settings)
    folder = run_folder(f"{wanted.run_name}-{digest}")
    facts = {
        "dopsd_base_model": base_name(model),
        "dopsd_base_fingerprint": identity.digest,
        "dopsd_trigger": conditions.trigger,
        "dopsd_teacher_sees": conditions.teacher.name,
        "dopsd_name": wanted.run_name,
    }
    options: Any = {"facts": facts, "initial": start.tensors, "checkpoint_blocks": plan.checkpoint_blocks}
    options["host_bytes"] = _preview_bytes(config, conditions) if vae is not None else 0
    check_run(config, denoiser, conditions.data, folder, options["host_bytes"])
    shape = (config.batch_size, *max((latent_shape(pair) for pair in conditions.data.pairs), key=_area))
    unused = unused_settings(wanted.preset, wanted.chosen, config, conditions, vae is not None)
    notes.add(*conditions.notes, *_model_notes(model), *identity.notes, *start.notes)
    notes.add(*wanted.unused, *unused, *plan.notes)
    preview = None if vae is None else _preview(model, denoiser, vae, conditions, plan, shape)
    watcher = Watcher(node, _facts(folder, denoiser, model, conditions, plan), notes, preview)
    with notes.with_warnings():
        result = _watched(watcher, denoiser, conditions, plan, folder, shape, options)
        sheets = load_sheets(folder / PREVIEWS_NAME)
        watcher.finished(result)
    return FinishedRun(result, config, folder, sheets)


def _watched(
    watcher: Watcher,
    denoiser: ComfyDenoiser,
    conditions: Conditions,
    plan: MemoryPlan,
    folder: Path,
    shape: Sequence[int],
    options: Any,
) -> TrainResult:
    """`train`; whatever ends it, the node says why and what is kept."""
    try:
        with denoiser.trainable(shape, plan.reserve):
            return train(plan.config, denoiser, conditions.data, folder, watcher, **options)
    except comfy.model_management.InterruptProcessingException:
        watcher.interrupted()
        raise
    except NonFiniteError as error:
        watcher.failed(str(error))
        raise TrainingError(f"{error}; {watcher.kept()}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            watcher.failed(str(error))
            raise
    # out of the handler: an exception holds on to the frames, and these to the activations
    free_device_memory()
    remedy = advice(plan, conditions, denoiser.device)
    # not "out of memory": newer ComfyUIs add advice of their own to any error with these words
    sentence = f"the GPU's memory ran out, with memory {plan.preset}: {watcher.kept()}; {remedy}"
    watcher.failed(sentence)
    raise OutOfMemory(sentence)


def _model_notes(model: Any) -> tuple[str, ...]:
    undistilled = warn_if_undistilled(model)
    return (*((undistilled,) if undistilled else ()), *unused_patches(model))


def _preview(
    model: Any, denoiser: ComfyDenoiser, vae: Any, conditions: Conditions, plan: MemoryPlan, shape: Sequence[int]
) -> TrainingPreview | None:
    if not plan.config.preview_every:
        return None
    painter = Painter(denoiser, vae, default_steps(model), plan.config.seed)
    during = plan.reserve - plan.footprint.lora - plan.footprint.training  # these two are there by then
    return TrainingPreview(painter, conditions.previews, lambda: denoiser.load(shape, during))


def _facts(folder: Path, denoiser: ComfyDenoiser, model: Any, conditions: Conditions, plan: MemoryPlan) -> RunFacts:
    modules, parameters = plan.config.adapter.size(denoiser.sites())
    return RunFacts(
        folder=folder,
        config=plan.config,
        modules=modules,
        parameters=parameters,
        base_model=base_name(model),
        trigger=conditions.trigger,
        teacher=conditions.teacher.name,
        memory=plan.preset,
    )


def trained_lora(result: TrainResult, config: TrainConfig) -> TrainedLora:
    """The LoRA in full precision, from the last checkpoint, with the header of the LoRA file."""
    tensors = config.adapter.exported(read_checkpoint_lora(result.checkpoint_path))
    prefix = get_family(config.family).key_prefix
    with safe_open(result.lora_path, "pt") as file:
        facts = file.metadata() or {}
    return TrainedLora({prefix + key: tensors[key] for key in sorted(tensors)}, facts)


def losses(reports: Sequence[StepReport]) -> list[float]:
    """The losses of the steps on training pictures; those of prior anchors have another target and stand in the log."""
    told = [report.loss for report in reports if report.loss is not None and not report.anchors]
    # a plot needs two points: a run of a few steps may have fewer without its anchors
    return told if len(told) > 1 else [report.loss for report in reports if report.loss is not None]


def _preview_bytes(config: TrainConfig, conditions: Conditions) -> int:
    """What the preview sheets of the run take on the disk, at most."""
    sheets = config.steps // config.preview_every + 2 if config.preview_every else 0
    return sheets * len(conditions.previews) * _ROWS * 3 * TILE**2


def _area(shape: Sequence[int]) -> int:
    return shape[-1] * shape[-2]
