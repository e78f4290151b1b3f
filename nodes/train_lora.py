"""The training node: settings in, LoRA out, and what the user watches in between."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from safetensors import safe_open
from torch import Tensor

from ..dopsd_core.config import TrainConfig
from ..dopsd_core.families import get_family
from ..dopsd_core.objectives import OBJECTIVES, LossForm
from ..dopsd_core.optimizers import OPTIMIZERS, SCHEDULES
from ..dopsd_core.teachers import TEACHERS
from ..dopsd_core.trainable import Trainable
from ..dopsd_core.training.checkpoint import read_checkpoint_lora
from ..dopsd_core.training.log import LOG_NAME, StepReport, read_log
from ..dopsd_core.training.trainer import NoCallbacks, TrainResult, train
from ..dopsd_core.training.training_set import latent_shape
from .comfy_host.denoiser import ComfyDenoiser, base_name, default_steps, fingerprint, send_text
from .comfy_host.distilled import warn_if_undistilled
from .comfy_host.memory_plan import (
    MEMORY_CHOICES,
    MemoryPlan,
    OutOfMemory,
    advice,
    free_device_memory,
    is_out_of_memory,
    plan_memory,
)
from .comfy_host.paths import run_folder, shown
from .comfy_host.presets import PRESETS, make_config, run_digest
from .comfy_host.previews import Painter, TrainingPreview, load_sheets
from .comfy_host.sockets import CATEGORY, Conditions, ConditionsSocket, TrainedLora
from .comfy_host.targets import require_blocks, size_of, told_size
from .conditions import require_same_family
from .load_lora import start_of

_TEXT_INTERVAL = 0.3  # seconds between two texts on the node
PREVIEWS_NAME = "previews"


class Watcher(NoCallbacks):
    """Progress bar with preview, and text with loss, gap and time left, on the node that trains."""

    def __init__(
        self, node: Any, plan: MemoryPlan, folder: Path, preview: TrainingPreview | None, notes: Sequence[str] = ()
    ) -> None:
        self._node, self._config, self._folder, self._preview = node, plan.config, folder, preview
        self._notes = (*notes, *plan.notes)
        self._bar = comfy.utils.ProgressBar(plan.config.steps)
        self._first: tuple[int, float] | None = None
        self._told = 0.0
        self.step = 0
        self._gap = ""

    def on_step(self, report: StepReport) -> None:
        """Moves the bar and rewrites the text."""
        self.step = report.step
        self._bar.update_absolute(report.step)
        now = time.monotonic()
        self._first = self._first or (report.step, now)
        if report.relative_gap is not None:
            self._gap = _told_gap(report.relative_gap, report.heldout_relative_gap)
        if now - self._told >= _TEXT_INTERVAL or report.step == self._config.steps:
            self._told = now
            send_text(self._node, self._text(report, now))

    def on_preview(self, step: int, adapters: Trainable) -> None:
        """Draws the sheet, keeps it in the run folder and shows it on the node."""
        if self._preview is None:
            return
        sheet = self._preview.sheet(f"{self._folder.name}: step {step} of {self._config.steps}", adapters)
        path = self._folder / PREVIEWS_NAME / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        self._bar.update_absolute(step, preview=("JPEG", sheet, None))

    def _text(self, report: StepReport, now: float) -> str:
        lines = [f"step {report.step} of {self._config.steps}"]
        done = report.step - self._first[0] if self._first else 0
        if done and self._first:
            each = (now - self._first[1]) / done
            left = each * (self._config.steps - report.step)
            lines[0] += f"  ·  {each:.2f} s each  ·  {_duration(left)} left"
        if report.loss is not None:
            lines.append(f"loss {report.loss:.4g}")
        if self._gap:
            lines.append(self._gap)
        lines += self._notes
        return "\n".join(lines)


def run_training(
    node: Any,
    model: Any,
    conditions: Conditions,
    vae: Any | None,
    config: TrainConfig,
    run_name: str,
    memory: str,
    initial_lora: Mapping[str, Tensor] | None = None,
) -> tuple[TrainResult, Path]:
    """Trains or goes on, in the folder that belongs to these settings, this model and this data.

    Raises:
        ValueError: a target matches nothing, or something outside the blocks.
        OutOfMemory: with what to change; the run's last checkpoint is kept and the GPU's memory given back.
    """
    identity = fingerprint(model)
    denoiser = ComfyDenoiser(model)
    require_blocks(denoiser, config.adapter)
    plan = plan_memory(memory, denoiser, conditions, config)
    config = plan.config
    start = start_of(initial_lora, denoiser, config)
    digest = run_digest(config, conditions.data.fingerprint(), identity, *start.identity)
    folder = run_folder(f"{run_name}-{digest}")
    facts = {
        "dopsd_base_model": base_name(model),
        "dopsd_base_fingerprint": identity,
        "dopsd_trigger": conditions.trigger,
        "dopsd_teacher_sees": conditions.teacher.name,
        "dopsd_name": run_name,
    }
    options: Any = {"facts": facts, "initial": start.tensors, "checkpoint_blocks": plan.checkpoint_blocks}
    shape = (config.batch_size, *max((latent_shape(pair) for pair in conditions.data.pairs), key=_area))
    preview = None
    if vae is not None and config.preview_every:
        painter = Painter(denoiser, vae, default_steps(model), config.seed)
        during = plan.reserve - plan.footprint.lora - plan.footprint.training  # these two are there by then
        preview = TrainingPreview(painter, conditions.previews, lambda: denoiser.load(shape, during))
    notes = [size_of(denoiser, config.adapter), *start.notes, warn_if_undistilled(model)]
    watcher = Watcher(node, plan, folder, preview, [note for note in notes if note])
    try:
        with denoiser.trainable(shape, plan.reserve):
            return train(config, denoiser, conditions.data, folder, watcher, **options), folder
    except comfy.model_management.InterruptProcessingException:
        send_text(node, f"stopped; run again with the same settings to go on\nLoRA so far: {shown(folder)}")
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        told = f"{watcher.step} steps are kept in {shown(folder)}" if watcher.step else "no step was done"
    # out of the handler: an exception holds on to the frames, and these to the activations
    free_device_memory()
    raise OutOfMemory(f"out of memory, with memory {plan.preset}: {told}; {advice(plan, conditions, denoiser.device)}")


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


def _area(shape: Sequence[int]) -> int:
    return shape[-1] * shape[-2]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


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
    def validate_inputs(cls, run_name="") -> bool | str:
        try:
            run_folder(run_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, conditions, run_name, preset, preview_every, vae=None, initial_lora=None, **settings
    ) -> io.NodeOutput:
        require_same_family(model, conditions)
        chosen = {"lr": settings.pop("learning_rate"), **settings, "preview_every": preview_every}
        chosen |= {"caption_dropout": conditions.caption_dropout}
        memory = chosen.pop("memory")
        config = make_config(preset, conditions.family, bool(conditions.data.anchors), chosen)
        result, folder = run_training(cls, model, conditions, vae, config, run_name, memory, initial_lora)
        reports, lora = read_log(folder / LOG_NAME), trained_lora(result, config)
        send_text(cls, _summary(result, folder, lora))
        return io.NodeOutput(lora, {"loss": losses(reports)}, str(folder), load_sheets(folder / PREVIEWS_NAME))


def _told_gap(relative: float, unseen: float | None) -> str:
    told = f"gap to the teacher {relative:.3f}" + (f", unseen prompt {unseen:.3f}" if unseen is not None else "")
    return f"{told}  (1 = before training)"


def _summary(result: TrainResult, folder: Path, lora: Mapping[str, Tensor]) -> str:
    lines = [f"{result.step} steps done"]
    if result.start_gaps and result.end_gaps:
        relative, unseen = result.end_gaps.relative_to(result.start_gaps)
        if relative is not None:
            lines.append(_told_gap(relative, unseen))
    lines.append(told_size(len(lora) // 2, sum(tensor.numel() for tensor in lora.values())))
    return "\n".join([*lines, shown(folder)])


def _inputs() -> list[Any]:
    return [
        io.Model.Input(
            "model", tooltip="The step-distilled model to teach: Z-Image-Turbo, FLUX.2-klein or the demo model."
        ),
        ConditionsSocket.Input("conditions", tooltip="From Build Teacher Condition."),
        io.String.Input(
            "run_name", default="my_concept", tooltip="Name of the run; its folder under output/dopsd starts with it."
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="standard",
            tooltip="Settings that fit together. standard: for most concepts. quick look: is it going anywhere? "
            "paper: the authors' settings, slow. demo model: for the embedded model only.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=100_000,
            tooltip="Optimizer steps; 0 takes the preset's. May be raised later.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            # by the input's name the page would draw another seed after each run, and no run would ever be resumed
            control_after_generate=False,
            tooltip="Decides the LoRA's start, the order of the pictures and all noise. Another seed is another run.",
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=10_000,
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
    ]


def _advanced_inputs() -> list[Any]:
    def whole(name: str, default: int, high: int, tooltip: str, low: int = 0) -> Any:
        return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip, advanced=True)

    def real(name: str, default: float, low: float, high: float, step: float, tooltip: str) -> Any:
        return io.Float.Input(
            name, default=default, min=low, max=high, step=step, round=False, tooltip=tooltip, advanced=True
        )

    def choice(name: str, options: Sequence[str], tooltip: str) -> Any:
        return io.Combo.Input(name, options=list(options), default=options[0], tooltip=tooltip, advanced=True)

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
            list(TEACHERS),
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
        choice("schedule", list(SCHEDULES), "Learning rate after warm-up: constant, or falling to 0 as a cosine."),
        choice("optimizer", list(OPTIMIZERS), "adamw8bit needs the package bitsandbytes."),
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
