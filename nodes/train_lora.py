"""The node D-OPSD Train LoRA."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image

from ..dopsd_core.image_grid import to_pixels
from ..dopsd_core.training.log import LOG_NAME, read_log
from .comfy_host.base_name import base_name
from .comfy_host.checked_inputs import checked
from .comfy_host.fits import require_trainable
from .comfy_host.former_inputs import AFTER_INITIAL_LORA, BEFORE_MEMORY, former_choices, former_inputs
from .comfy_host.memory_plan import MEMORY_CHOICES
from .comfy_host.model_patches import require_own_sampling
from .comfy_host.paths import require_run_name
from .comfy_host.presets import PRESETS, USUAL, preset_steps
from .comfy_host.sent_values import unread_before, unread_inputs
from .comfy_host.settings import TrainingSettings
from .comfy_host.shared_inputs import conditions_input, seed_input
from .comfy_host.sockets import CATEGORY, Conditions, SettingsSocket
from .comfy_host.training import Wanted, losses, run_training

log = logging.getLogger("dopsd")


class TrainLoRA(io.ComfyNode):
    """Trains a LoRA by on-policy self-distillation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_TrainLoRA",
            display_name="D-OPSD Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA that teaches a step-distilled model a concept and keeps its few steps (D-OPSD, "
            "arXiv 2605.05204): the model takes its own few steps and is pulled towards what it would do if it saw "
            "the image. Cancel at any time: the next run with the same settings resumes. The MODEL is not changed.",
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
                    tooltip="The folder of the run: settings, log, checkpoints, previews and the LoRA.",
                ),
                io.Image.Output(display_name="previews", tooltip="All preview sheets, in the order of their steps."),
                io.LoraModel.Output(
                    display_name="best_lora",
                    tooltip="The LoRA of the step with the smallest gap on the unseen prompt, of those that save_every "
                    "(Training Settings) keeps. Without it, the same as lora.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        """True, or what is wrong with the name."""
        try:
            if isinstance(run_name, str):  # else it comes over a link
                require_run_name(run_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, model, conditions, run_name, preset, memory, vae=None, initial_lora=None, settings=None, **widgets
    ) -> io.NodeOutput:
        """Trains or resumes; `widgets` are the other inputs by id."""
        require_trainable(model, conditions, vae)
        require_own_sampling(model)
        preset, changes, unused = chosen_settings(preset, settings, widgets, conditions)
        unused = (*unread_inputs(cls), *unread_before(cls), *unused)
        wanted = Wanted(run_name, base_name(model, cls), memory, preset, changes, unused)
        run = run_training(cls, model, conditions, vae, wanted, initial_lora)
        loss = losses(read_log(run.folder / LOG_NAME))
        return io.NodeOutput(
            run.lora, {"loss": loss}, str(run.folder), run.sheets, run.best, ui=shown_on(cls, run.chart)
        )


def shown_on(node: Any, chart: Image.Image) -> ui.PreviewImage | None:
    """The chart on the node, where it stays; None if ComfyUI's temporary folder cannot be written."""
    try:
        return ui.PreviewImage(to_pixels(chart), cls=node)
    except OSError as error:  # the LoRA is saved: a run must not fail for its chart
        log.warning("the chart is not shown on the node: %s", error)
        return None


def chosen_settings(
    preset: str, settings: TrainingSettings | None, widgets: Mapping[str, Any], conditions: Conditions
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """(preset, options that differ from it, notes on what is not used), from the node's widgets and Training Settings.

    Raises:
        ValueError: Training Settings is for another model family.
    """
    chosen = former_choices(widgets)
    own = {name: widgets[name] for name in ("seed", "preview_every")} | {"caption_dropout": conditions.caption_dropout}
    if widgets["steps"]:
        own["steps"] = widgets["steps"]
    if settings is None:
        return preset, {**chosen, **own}, ()
    if settings.family is not conditions.family:
        raise ValueError(
            f"the settings are filled in for {settings.family.title}, and {conditions.family.title} is trained: choose "
            f"{conditions.family.title} as model_family of Training Settings"
        )
    unused = [f"{name} {value} is not used: Training Settings is connected" for name, value in chosen.items()]
    if preset != settings.preset:
        unused.append(f"the preset {preset} is not used: Training Settings has {settings.preset}")
    return settings.preset, {**settings.changes, **own}, tuple(unused)


def _inputs() -> list[Any]:
    return [
        *_first_inputs(),
        *former_inputs(BEFORE_MEMORY),
        io.Combo.Input(
            "memory",
            options=list(MEMORY_CHOICES),
            default=MEMORY_CHOICES[0],
            optional=True,
            tooltip="VRAM to fit into; auto goes by your GPU. What does not fit uses gradient checkpointing or is "
            "streamed from RAM: slower, same result. From 16 GB down the teacher is frozen, from 12 GB down fewer "
            "steps are learned from; the node reports it.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="The model's own VAE, for preview images; not needed for training."),
        io.LoraModel.Input(
            "initial_lora",
            optional=True,
            tooltip="A LoRA of any trainer to continue training, from Load LoRA (D-OPSD). Its rank may be at most the "
            "run's. A different one starts a new run.",
        ),
        *former_inputs(AFTER_INITIAL_LORA),
        SettingsSocket.Input(
            "settings", optional=True, tooltip="From Training Settings: every other option. Replaces the preset."
        ),
    ]


def _first_inputs() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            tooltip="The step-distilled model to train: Z-Image-Turbo, FLUX.2-klein, Krea 2 Turbo or the demo model.",
        ),
        conditions_input(),
        io.String.Input(
            "run_name",
            default="my_concept",
            optional=True,
            tooltip="Name of the run; its folder under output/dopsd starts with it.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=USUAL,
            optional=True,
            tooltip="Settings that fit together, by what you train: a subject, a style, a character, an edit. quick "
            "look: a short first try. paper: the authors' settings, slow. demo model: for Load Demo Models only. "
            "standard: what subject was before.",
            extra_dict={"dopsd_steps": preset_steps()},
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=100_000,
            optional=True,
            tooltip="Optimizer steps; 0: the preset's for this model. May be raised when a run is resumed.",
        ),
        seed_input(
            "Decides the LoRA's initial weights, the order of the images and all noise. A different seed starts a "
            "new run."
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=10_000,
            optional=True,
            tooltip="Steps between preview images, which need the VAE; 0 for none.",
        ),
    ]
