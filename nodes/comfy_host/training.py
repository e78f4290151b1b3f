"""A training run of the node: plan, folder, notes and progress around the core's `train`, and its outputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ...dopsd_core.adapters.lora_file import read_safetensors
from ...dopsd_core.conditioning.cache import ConditionCache
from ...dopsd_core.config import TrainConfig
from ...dopsd_core.families import get_family
from ...dopsd_core.objectives import Objective
from ...dopsd_core.sharing.model_spec import trigger_facts
from ...dopsd_core.training.aims import require_taught
from ...dopsd_core.training.checkpoint import read_checkpoint_lora
from ...dopsd_core.training.log import StepReport
from ...dopsd_core.training.own_files import is_foreign
from ...dopsd_core.training.trainer import NonFiniteError, TrainResult, check_run, train
from ...dopsd_core.training.training_set import latent_shape
from .base_name import UNKNOWN
from .denoiser import ComfyDenoiser, default_steps
from .distilled import note_if_undistilled, warn_if_undistilled, why_undistilled
from .identity import identity_of
from .lora_header import kept_header
from .memory_plan import MemoryPlan, OutOfMemory, advice, free_device_memory, is_out_of_memory, plan_memory
from .model_patches import unused_patches
from .paths import condition_cache
from .presets import make_config, merged_settings, run_digest
from .previews import TILE, PreviewPainter, TrainingPreview, load_sheets
from .report import Notes
from .run_folders import folder_of_run
from .sockets import Conditions, TrainedLora
from .start import start_of
from .targets import require_blocks
from .unused import aim_notes, unused_settings
from .watcher import PREVIEWS_NAME, RunFacts, Watcher, chart_of_run

log = logging.getLogger("dopsd")

_ROWS = 4  # of a preview sheet: source, before, teacher, student


class TrainingError(RuntimeError):
    """Training cannot continue; the message says what to change and what is saved where."""


@dataclass(frozen=True)
class Wanted:
    """The training that the node was asked for.

    Attributes:
        run_name: start of the run folder's name.
        base: name of the MODEL's file; "" if it is not known.
        memory: one of `MEMORY_CHOICES`.
        preset: its name in `PRESETS`.
        chosen: options by flat name, as for `make_config`.
        unused: notes on settings that were given and have no effect.
    """

    run_name: str
    base: str
    memory: str
    preset: str
    chosen: Mapping[str, Any]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run whose steps are all done.

    Attributes:
        folder: the run's folder.
        lora: see `trained_lora`.
        best: see `best_lora`.
        sheets: the preview sheets, [n, H, W, 3]; see `load_sheets`.
        chart: loss and gaps over its steps, below the last sheet.
    """

    folder: Path
    lora: TrainedLora
    best: TrainedLora
    sheets: Tensor
    chart: Image.Image


@dataclass(frozen=True, eq=False)
class _PlannedRun:
    """Everything that `train` is called with.

    Attributes:
        denoiser: the MODEL.
        conditions: dataset and previews.
        plan: configuration and memory.
        folder: the run's folder.
        shape: largest batch of latents, [B, C, h, w].
        sample_steps: steps in which the MODEL draws class images.
        metadata: of the LoRA file.
        initial: the initial weights.
        host_bytes: what previews will take on the disk.
        notes: for the user, apart from those of warnings.
    """

    denoiser: ComfyDenoiser
    conditions: Conditions
    plan: MemoryPlan
    folder: Path
    shape: tuple[int, ...]
    sample_steps: int
    metadata: Mapping[str, str]
    initial: Mapping[str, Tensor] | None
    host_bytes: int
    notes: tuple[str, ...]


def run_training(
    node: Any,
    model: Any,
    conditions: Conditions,
    vae: Any | None,
    wanted: Wanted,
    initial_lora: Mapping[str, Tensor] | None = None,
) -> FinishedRun:
    """Trains or resumes, in the folder that belongs to these settings, this model and this dataset.

    Args:
        node: the node class, which shows progress and notes.
        vae: for previews; None for no previews.
        initial_lora: the LoRA to start from, tensors by name, such as lora_A [rank, in] and lora_B [out, rank].

    Raises:
        ConfigError: the settings are not valid together.
        ValueError: a target matches nothing, or a layer outside the blocks.
        TrainingError: loss or gradient is not finite.
        DiskError: the folder cannot be written or the disk is too full; raised before the model is loaded if possible.
        OutOfMemory: the GPU ran out of memory; the message says what to change. The last checkpoint is kept and the
            GPU's memory is freed.
    """
    notes = Notes()
    with notes.with_warnings():
        run = _planned(model, conditions, vae is not None, wanted, initial_lora)
    notes.add(*run.notes)
    check_run(run.plan.config, run.denoiser, conditions.data, run.folder, run.host_bytes)
    preview = None if vae is None else _preview(model, vae, run)
    watcher = Watcher(node, _facts(run), notes, preview)
    with notes.with_warnings():
        result = _watched(watcher, run)
        lora, best = trained_lora(result, run.plan.config), best_lora(result, run.plan.config)
        sheets = load_sheets(run.folder / PREVIEWS_NAME)
        watcher.finished(result)
    return FinishedRun(run.folder, lora, best, sheets, chart_of_run(run.folder, run.plan.config.steps, sheets))


def _planned(
    model: Any, conditions: Conditions, has_vae: bool, wanted: Wanted, initial_lora: Mapping[str, Tensor] | None
) -> _PlannedRun:
    identity, denoiser = identity_of(model), ComfyDenoiser(model)
    has_anchors = bool(conditions.data.anchors)
    config = make_config(wanted.preset, conditions.family, has_anchors, wanted.chosen)
    require_taught(conditions.teacher, config.objective)
    require_blocks(denoiser, config.adapter)
    plan = plan_memory(wanted.memory, denoiser, conditions, config)
    config = plan.config
    start = start_of(initial_lora, denoiser, config, conditions.trigger, wanted.base)
    settings = merged_settings(wanted.preset, conditions.family, has_anchors, wanted.chosen)
    drawing = (f"class images in {default_steps(model)} steps",) if config.objective.drawn_images else ()
    facts = (conditions.data.fingerprint(), identity.digest, *start.identity, *drawing)
    folder = folder_of_run(wanted.run_name, config, lambda cut: run_digest(cut, *facts, settings=settings))
    unused = unused_settings(wanted.preset, wanted.chosen, config, conditions, has_vae)
    return _PlannedRun(
        denoiser=denoiser,
        conditions=conditions,
        plan=plan,
        folder=folder,
        shape=(
            config.objective.forward_batch(config.batch_size),
            *max((latent_shape(pair) for pair in conditions.data.pairs), key=_area),
        ),
        sample_steps=default_steps(model),
        metadata=_metadata(model, identity.digest, conditions, wanted),
        initial=start.tensors,
        host_bytes=_preview_bytes(config, conditions) if has_vae else 0,
        notes=(
            *conditions.notes,
            *aim_notes(wanted.preset, conditions, config.objective),
            *_model_notes(model, wanted.base, config.objective),
            *identity.notes,
            *start.notes,
            *wanted.unused,
            *unused,
            *plan.notes,
        ),
    )


def _metadata(model: Any, fingerprint: str, conditions: Conditions, wanted: Wanted) -> dict[str, str]:
    return {
        "dopsd_base_model": wanted.base,
        **({} if wanted.base else {"dopsd_base_model_note": UNKNOWN}),
        "dopsd_base_fingerprint": fingerprint,
        **trigger_facts(conditions.trigger, conditions.concepts),
        **conditions.teacher.facts,
        "dopsd_name": wanted.run_name,
        "dopsd_resolution": _resolution(conditions),
        **({"dopsd_undistilled": reason} if (reason := why_undistilled(model, wanted.base)) else {}),
    }


def _resolution(conditions: Conditions) -> str:
    """The size in pixels of the largest training image, such as 1024x768."""
    height, width = max((shape[-2:] for shape in conditions.data.shapes()), key=math.prod)
    return f"{width * conditions.family.downscale}x{height * conditions.family.downscale}"


def _watched(watcher: Watcher, run: _PlannedRun) -> TrainResult:
    """Trains; however it ends, the node shows why and what is saved."""
    try:
        result = _trained_unless_out_of_memory(watcher, run)
    except comfy.model_management.InterruptProcessingException:
        watcher.interrupted()
        raise
    except NonFiniteError as error:
        watcher.failed(str(error))
        raise TrainingError(f"{error}; {watcher.kept()}") from error
    except Exception as error:
        watcher.failed(str(error))
        raise
    if result is None:
        free_device_memory()
        remedy = advice(run.plan, run.conditions, run.denoiser.device)
        # without the words "out of memory": newer ComfyUIs add their own advice to any error with them
        sentence = f"the GPU's memory ran out, with memory {run.plan.preset}: {watcher.kept()}; {remedy}"
        watcher.failed(sentence)
        raise OutOfMemory(sentence)
    return result


def _trained_unless_out_of_memory(watcher: Watcher, run: _PlannedRun) -> TrainResult | None:
    """The result of `train`; None if the GPU ran out of memory.

    Not as an exception: that would keep the frames alive, and with them the activations that have to be freed.
    """
    try:
        with run.denoiser.trainable(run.shape, run.plan.reserve):
            return train(
                run.plan.config,
                run.denoiser,
                run.conditions.data,
                run.folder,
                watcher,
                facts=run.metadata,
                initial=run.initial,
                checkpointing=run.plan.checkpointing,
                keeps_casts=run.plan.footprint.keeps_casts,
                host_bytes=run.host_bytes,
                sample_steps=run.sample_steps,
                cache=ConditionCache(condition_cache()),
            )
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


def _model_notes(model: Any, name: str, objective: Objective) -> tuple[str, ...]:
    if objective.needs_few_steps:
        undistilled = warn_if_undistilled(model, name)
    else:
        undistilled = note_if_undistilled(model, name, objective.name)
    return (*(() if name else (UNKNOWN,)), *((undistilled,) if undistilled else ()), *unused_patches(model))


def _preview(model: Any, vae: Any, run: _PlannedRun) -> TrainingPreview | None:
    plan, denoiser = run.plan, run.denoiser
    if not plan.config.preview_every:
        return None
    painter = PreviewPainter(denoiser, vae, default_steps(model), plan.config.seed)
    during = plan.reserve - plan.footprint.lora - plan.footprint.training  # these two are already allocated then
    return TrainingPreview(painter, run.conditions, lambda: denoiser.load(run.shape, during))


def _facts(run: _PlannedRun) -> RunFacts:
    modules, parameters = run.plan.config.adapter.size(run.denoiser.sites())
    return RunFacts(
        folder=run.folder,
        config=run.plan.config,
        modules=modules,
        parameters=parameters,
        base_model=run.metadata["dopsd_base_model"],
        trigger=run.conditions.trigger or ", ".join(run.conditions.concepts),
        teacher=run.conditions.teacher.name,
        memory=run.plan.preset,
    )


def trained_lora(result: TrainResult, config: TrainConfig) -> TrainedLora:
    """The LoRA in full precision, from the last checkpoint, with the metadata of the LoRA file."""
    tensors = config.adapter.exported(read_checkpoint_lora(result.checkpoint_path))
    prefix = get_family(config.family).key_prefix
    with safe_open(result.lora_path, "pt") as file:
        facts = kept_header(file.metadata() or {})[0]
    return TrainedLora({prefix + key: tensors[key] for key in sorted(tensors)}, facts)


def best_lora(result: TrainResult, config: TrainConfig) -> TrainedLora:
    """The LoRA file of the step with the smallest gap on the unseen prompt; the trained LoRA if none is kept."""
    best, trained = result.best, trained_lora(result, config)
    if best is None or best.path is None or best.step == result.step:
        return trained
    if is_foreign(best.path, trained.facts, best.step):
        problem = f"{best.path} was not written by this run"
    else:
        try:
            tensors, header = read_safetensors(best.path)
            return TrainedLora(tensors, kept_header(header)[0])
        except (OSError, ValueError) as error:
            problem = str(error)
    log.warning("%s: best_lora is the LoRA of step %d instead", problem, result.step)
    return trained


def losses(reports: Sequence[StepReport]) -> list[float]:
    """The losses of the steps on training images; those of prior anchors have another target and are in the log."""
    on_images = [report.loss for report in reports if report.loss is not None and not report.anchors]
    # a plot needs two points: a run of a few steps may have fewer without its anchors
    return on_images if len(on_images) > 1 else [report.loss for report in reports if report.loss is not None]


def _preview_bytes(config: TrainConfig, conditions: Conditions) -> int:
    """The largest size on disk of all preview sheets of the run."""
    sheets = config.steps // config.preview_every + 2 if config.preview_every else 0
    return sheets * len(conditions.previews) * _ROWS * 3 * TILE**2


def _area(shape: Sequence[int]) -> int:
    return shape[-1] * shape[-2]
