"""The training node: settings in, LoRA out, and what the user watches in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
from comfy_api.latest import io
from safetensors import safe_open
from torch import Tensor

from ..dopsd_core.adapters import TeacherKind
from ..dopsd_core.config import OptimizerName, Schedule, TrainConfig
from ..dopsd_core.families import get_family
from ..dopsd_core.lora_config import lora_size
from ..dopsd_core.lora_file import fold_alpha
from ..dopsd_core.objectives import OBJECTIVES, LossForm
from ..dopsd_core.progress import LOG_NAME, StepReport, read_log
from ..dopsd_core.state import read_checkpoint_lora
from ..dopsd_core.trainer import NonFiniteError, TrainResult, check_run, train
from ..dopsd_core.training_set import latent_shape
from .checkpoints import warn_if_undistilled
from .fits import require_trainable
from .host import ComfyDenoiser, base_name, default_steps
from .identity import identity_of
from .initial_lora import start_of
from .inputs import checked
from .memory import (
    MEMORY_CHOICES,
    MemoryPlan,
    OutOfMemory,
    advice,
    free_device_memory,
    is_out_of_memory,
    plan_memory,
)
from .model_patches import require_own_sampling, unused_patches
from .paths import run_folder
from .presets import PRESETS, make_config, run_digest
from .previews import TILE, Painter, TrainingPreview, load_sheets
from .report import Notes
from .sockets import CATEGORY, Conditions, ConditionsSocket, TrainedLora
from .targets import require_blocks
from .unused import unused_settings
from .watcher import PREVIEWS_NAME, RunFacts, Watcher

_ROWS = 4  # of a preview sheet: source, before, teacher, student


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change, and what is kept where."""


@dataclass(frozen=True)
class Wanted:
    """What the node's widgets ask for. memory: of `MEMORY_CHOICES`. chosen: as for `make_config`."""

    run_name: str
    memory: str
    preset: str
    chosen: Mapping[str, Any]


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
    require_blocks(denoiser, config.lora)
    plan = plan_memory(wanted.memory, denoiser, conditions, config)
    config = plan.config
    start = start_of(initial_lora, denoiser, config, conditions.trigger, base_name(model))
    digest = run_digest(config, conditions.data.fingerprint(), identity.digest, *start.identity)
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
    notes.add(*conditions.notes, *_model_notes(model), *identity.notes, *start.notes, *unused, *plan.notes)
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
    sentence = f"out of memory, with memory {plan.preset}: {watcher.kept()}; {remedy}"
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
    modules, parameters = lora_size(denoiser.sites(), plan.config.lora)
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
    tensors = fold_alpha(read_checkpoint_lora(result.checkpoint_path), config.lora)
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


class TrainLoRA(io.ComfyNode):
    """Teaches the model a concept by on-policy self-distillation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_TrainLoRA",
            display_name="D-OPSD Train LoRA",
            category=CATEGORY,
            description="Teaches a step-distilled model a concept and keeps its few steps (D-OPSD, arXiv 2605.05204): "
            "the model takes its own few steps and is pulled to what it would do if it saw the picture. Cancel "
            "whenever you like; the next run with the same settings goes on where it stopped. The MODEL is left as it "
            "was.",
            search_aliases=["d-opsd", "train lora", "self-distillation", "fine-tune"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="The trained LoRA: for Load LoRA Model, Save LoRA (D-OPSD), Compare LoRA.",
                ),
                io.LossMap.Output(display_name="loss", tooltip="Loss of each step, for Plot Loss Graph."),
                io.String.Output(
                    display_name="run_folder",
                    tooltip="Where the run lives: settings, log, checkpoints, previews and the LoRA.",
                ),
                io.Image.Output(display_name="previews", tooltip="The preview sheets in the order of their steps."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        try:
            if isinstance(run_name, str):  # else it comes over a link
                run_folder(run_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, model, conditions, run_name, preset, memory, learning_rate, vae=None, initial_lora=None, **settings
    ) -> io.NodeOutput:
        require_trainable(model, conditions, vae)
        require_own_sampling(model)
        chosen = {**settings, "lr": learning_rate, "caption_dropout": conditions.caption_dropout}
        run = run_training(cls, model, conditions, vae, Wanted(run_name, memory, preset, chosen), initial_lora)
        reports, lora = read_log(run.folder / LOG_NAME), trained_lora(run.result, run.config)
        return io.NodeOutput(lora, {"loss": losses(reports)}, str(run.folder), run.sheets)


def _inputs() -> list[Any]:
    return [
        io.Model.Input(
            "model", tooltip="The step-distilled model to teach: Z-Image-Turbo, FLUX.2-klein or the demo model."
        ),
        ConditionsSocket.Input("conditions", tooltip="From Build Teacher Condition."),
        io.String.Input(
            "run_name",
            default="my_concept",
            optional=True,
            tooltip="Name of the run; its folder under output/dopsd starts with it.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="standard",
            optional=True,
            tooltip="Settings that fit together. standard: for most concepts. quick look: is it going anywhere? "
            "paper: the authors' settings, slow. demo model: for the embedded model only.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=100_000,
            optional=True,
            tooltip="Optimizer steps; 0 takes the preset's. May be raised later.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            # by the input's name the page would draw another seed after each run, and no run would ever be resumed
            control_after_generate=False,
            optional=True,
            tooltip="Decides the LoRA's start, the order of the pictures and all noise. Another seed is another run.",
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=10_000,
            optional=True,
            tooltip="Steps between preview pictures, which need the VAE; 0 for none.",
        ),
        *_advanced_inputs(),
        io.Vae.Input(
            "vae", optional=True, tooltip="The model's own VAE, for the preview pictures; training goes without."
        ),
        io.LoraModel.Input(
            "initial_lora",
            optional=True,
            tooltip="A LoRA to train further, of any trainer, from Load LoRA (D-OPSD). Its rank may be at most the "
            "run's. It counts as a setting: another one is another run.",
        ),
        io.String.Input(
            "targets",
            default="",
            optional=True,
            advanced=True,
            tooltip="Which layers learn: names or patterns, separated by commas, such as layers.*.attention.*; empty: "
            "all attention and MLP layers of the blocks.",
        ),
        io.Boolean.Input(
            "deterministic",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Use torch's deterministic algorithms, so that equal runs on a GPU end bit-identical. Slower; on "
            "NVIDIA start ComfyUI with --deterministic. Switching it makes another run.",
        ),
    ]


def _advanced_inputs() -> list[Any]:
    advanced: Any = {"advanced": True, "optional": True}

    def whole(name: str, default: int, high: int, tooltip: str, low: int = 0) -> Any:
        return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip, **advanced)

    def real(name: str, default: float, low: float, high: float, step: float, tooltip: str) -> Any:
        return io.Float.Input(
            name, default=default, min=low, max=high, step=step, round=False, tooltip=tooltip, **advanced
        )

    def choice(name: str, options: Sequence[str], tooltip: str) -> Any:
        return io.Combo.Input(name, options=list(options), default=options[0], tooltip=tooltip, **advanced)

    return [
        real(
            "learning_rate",
            0.0,
            0.0,
            0.1,
            1e-6,
            "Step size of AdamW; 0 takes the preset's (the paper: 1e-4, for FLUX.2-klein 2e-5).",
        ),
        whole("rank", 0, 1024, "Size of the LoRA; 0 takes the preset's."),
        real("alpha", 0.0, 0.0, 4096.0, 0.5, "The LoRA is scaled by alpha / rank; 0 keeps the preset's scale."),
        whole("batch_size", 0, 64, "Pictures in one forward; 0 takes the preset's."),
        whole("grad_accumulation", 0, 1024, "Batches that make one optimizer step together; 0 takes the preset's."),
        whole("warmup", 0, 10_000, "Steps over which the learning rate rises; 0 takes the preset's."),
        whole("rollout_steps", 4, 16, "K: the few steps that the student takes in training.", low=1),
        whole("grad_steps", 0, 16, "Learn from so many of the K steps, drawn at random: faster, noisier. 0 for all."),
        choice("loss", get_args(LossForm), "x0 converges faster, velocity is as printed in the paper."),
        choice(
            "teacher",
            get_args(TeacherKind),
            "Weights of the teacher: a moving average of the student's (ema), the untouched model (frozen, saves "
            "memory), or the student's own (same).",
        ),
        real("ema_decay", 0.0, 0.0, 1.0, 1e-4, "Share of the teacher ema that stays at a step; 0 takes the preset's."),
        real(
            "anchor_probability",
            -1.0,
            -1.0,
            1.0,
            0.05,
            "Share of batches that hold ordinary prompts at the untouched model, so that the concept stays out of "
            "them; below 0 takes the preset's.",
        ),
        choice("objective", list(OBJECTIVES), "dopsd: self-distillation. sft: ordinary fine-tuning, to compare with."),
        choice("schedule", get_args(Schedule), "Learning rate after warm-up: constant, or falling to 0 as a cosine."),
        choice("optimizer", get_args(OptimizerName), "adamw8bit needs the package bitsandbytes."),
        whole("checkpoint_every", 100, 10_000, "Steps between checkpoints.", low=1),
        whole("probe_every", 25, 10_000, "Steps between measurements of the gap to the teacher; 0 for none."),
        choice(
            "memory",
            MEMORY_CHOICES,
            "Size of the GPU to fit into; auto goes by the one you have. What does not fit is recomputed or streamed, "
            "which only takes time; from 16 GB down the teacher is frozen, from 12 GB down fewer steps are learned "
            "from. The node says what was done.",
        ),
    ]
