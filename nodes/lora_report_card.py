"""The node LoRA Report Card: concept, following, few steps and retention of a LoRA, beside the untouched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..dopsd_core.data.captions import CaptionError, check_prompts, check_text
from ..dopsd_core.image_grid import to_pixels
from ..dopsd_core.metrics.evaluation import Evaluation
from ..dopsd_core.metrics.report_card import draw_report_card, summary_lines, to_json
from .comfy_host.card import LoraOnModel, Wanted, make_evaluation
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.families import family_of
from .comfy_host.fits import is_demo_model, require_trainable, require_vae
from .comfy_host.lora_use import NONE, chosen_lora, parse_strengths, stamp_of_choice, used_line
from .comfy_host.metric_weights import FOLDER, load_chosen, weight_choices
from .comfy_host.model_patches import require_own_sampling, unused_schedule
from .comfy_host.previews import split_lines
from .comfy_host.shared_inputs import sampling_steps_input, seed_input
from .comfy_host.sockets import CATEGORY, Conditions, ConditionsSocket, Dataset, DatasetSocket

MAX_PROMPTS = 64
PROMPTS = (
    "a photo of [V] on a wooden table\na photo of [V] in the snow\na photo of a dog in a park\n"
    "a portrait of an old fisherman\na street at night in the rain\na bowl of fruit, oil painting"
)


class LoRAReportCard(io.ComfyNode):
    """Every measure of a LoRA at each strength, in one image and as JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_LoRAReportCard",
            display_name="LoRA Report Card",
            category=CATEGORY,
            description="Draws the same prompts with and without a LoRA from the same noise and measures four things: "
            "is the concept there, do images follow their prompts, are the few steps as good as before, do ordinary "
            "prompts look as before. A change counts only if it is larger than what other noise alone changes.",
            search_aliases=["d-opsd", "evaluate lora", "metrics", "score lora", "forgetting"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.dynprompt],
            inputs=[*_sockets(), *_settings(), *_optional()],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The report card."),
                io.String.Output(display_name="report", tooltip="Every value, as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, strengths: str | None = None, prompts: str | None = None, class_name: str | None = None
    ) -> bool | str:
        """True, or what is wrong with strengths, prompts or class_name."""
        try:
            if isinstance(strengths, str):  # else it comes over a link
                card_strengths(strengths)
            if isinstance(prompts, str):
                card_prompts(prompts)
            if isinstance(class_name, str):
                card_class_name(class_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = NONE, **others: Any) -> Any:
        """Changes when the file is replaced, so that ComfyUI runs the node again."""
        return stamp_of_choice(lora_name, "lora" in others)

    @classmethod
    @checked
    def execute(cls, dataset, conditions=None, **inputs: Any) -> io.NodeOutput:
        """Draws, scores and shows the report card."""
        evaluation = evaluate_lora(dataset, conditions, inputs)
        send_text(cls, "\n".join(summary_lines(evaluation)))
        image = to_pixels(draw_report_card(evaluation))
        return io.NodeOutput(image, to_json(evaluation), ui=ui.PreviewImage(image, cls=cls))


def evaluate_lora(dataset: Dataset, conditions: Conditions | None, inputs: Mapping[str, Any]) -> Evaluation:
    """The evaluation that the node's inputs ask for.

    Raises:
        ValueError: inputs do not belong together, or a metric is not available.
    """
    model, judge = inputs["model"], inputs.get("judge")
    require_fitting(model, inputs["vae"], conditions)
    name, tensors = chosen_lora(inputs["lora_name"], inputs.get("lora"), "report on")
    wanted = wanted_of(inputs)
    notes = [used_line(name, model, tensors), *unused_schedule(model), *notes_on(inputs, conditions, judge)]
    notes += check_prompts(wanted.prompts, "prompt", dataset.trigger)
    return make_evaluation(
        LoraOnModel(name, tensors, model, inputs["clip"], inputs["vae"]), dataset, conditions,
        lambda: load_chosen(chosen_weights(inputs), judge, inputs["judge_kind"]), wanted, notes,
    )  # fmt: skip


WEIGHTS = {
    "dino": "DINO-D: DINOv3 ViT-S+/16, a folder in the format of transformers.",
    "lpips": "LPIPS-D: torchvision's VGG-16, a file; needs pip install lpips.",
    "clip_score": "CLIP-S: DFN-5B's CLIP ViT-H-14, a folder or file for open_clip; needs pip install open_clip_torch.",
}
"""Inputs for weights of metrics."""


def require_fitting(model: Any, vae: Any, conditions: Any | None) -> None:
    """Raises ValueError when model, VAE and conditions do not belong together, or the MODEL is patched to other
    sampling."""
    require_vae(vae, family_of(model), is_demo_model(model))
    if conditions is not None:
        require_trainable(model, conditions, vae)
        require_own_sampling(model)


def wanted_of(settings: Mapping[str, Any]) -> Wanted:
    """The node's settings as values."""
    return Wanted(
        prompts=card_prompts(settings["prompts"]),
        strengths=card_strengths(settings["strengths"]),
        seed=settings["seed"],
        num_seeds=settings["images_per_prompt"],
        steps=settings["steps"],
        resolution=settings["resolution"],
        class_name=card_class_name(settings["class_name"]),
    )


def chosen_weights(settings: Mapping[str, Any]) -> dict[str, str]:
    """The choice of weights by metric, as the core names them."""
    return {"dino": settings["dino"], "lpips": settings["lpips"], "clip": settings["clip_score"]}


def notes_on(settings: Mapping[str, Any], conditions: Any | None, judge: Any | None) -> list[str]:
    """What the report does not contain, and why."""
    notes = []
    if all(settings[key] == NONE for key in WEIGHTS) and judge is None:
        notes.append(
            f"no weights of metrics are chosen (folder models/{FOLDER}): following is not measured, and retention is a "
            "distance of pixels"
        )
    if conditions is None:
        notes.append("conditions is not connected: the gap to the teacher is not measured")
    return notes


def card_strengths(text: str) -> tuple[float, ...]:
    """ "0.5, 1" -> (0.5, 1.0), without 0.

    Raises:
        ValueError: no number, too many, or one out of range.
    """
    found = tuple(strength for strength in parse_strengths(text) if strength)
    if not found:
        raise ValueError("strengths: 0 is the untouched model, which is always drawn; add another, such as 1.0")
    return found


def card_prompts(text: str) -> tuple[str, ...]:
    """The lines that are not empty, without duplicates; there may be none.

    Raises:
        ValueError: there are too many for one report, or one contains invalid characters.
    """
    found = split_lines(text)
    if len(found) > MAX_PROMPTS:
        raise ValueError(f"prompts: give at most {MAX_PROMPTS} prompts, one per line, there are {len(found)}")
    check_prompts(found, "prompts: line")
    return tuple(found)


def card_class_name(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it contains invalid characters.
    """
    try:
        check_text(text)
    except CaptionError as error:
        raise ValueError(f"class_name: {error}") from error
    return text


def _sockets() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model that the LoRA was trained for, without the LoRA."),
        io.Clip.Input("clip", tooltip="The model's text encoder."),
        io.Vae.Input("vae", tooltip="The model's VAE."),
        DatasetSocket.Input("dataset", tooltip="The images that the LoRA was trained on; four of them are compared."),
    ]


def _settings() -> list[Any]:
    return [
        io.String.Input(
            "prompts", multiline=True, default=PROMPTS, optional=True,
            tooltip="One prompt per line. With [V] or the trigger: other scenes of the concept. Without it: ordinary "
            "prompts, which should not change. The captions of the dataset are always drawn.",
        ),
        io.String.Input(
            "strengths", default="1.0", optional=True,
            tooltip="Strengths of the LoRA, separated by commas: 0.5, 1.0.",
        ),
        io.Int.Input(
            "images_per_prompt", default=2, min=1, max=16, optional=True,
            tooltip="Images of each prompt, from different noise; more make the intervals narrower.",
        ),
        seed_input("Seed of the noise, from which each prompt gets its own."),
        sampling_steps_input(),
        io.Int.Input(
            "resolution", default=1024, min=64, max=4096, step=16, optional=True,
            tooltip="Images have about resolution x resolution pixels, in the shape of their source; 64 for the demo "
            "model.",
        ),
        io.String.Input(
            "class_name", default="", optional=True,
            tooltip="What the concept is, such as dog: replaces the trigger in what CLIP-S reads.",
        ),
        io.Combo.Input(
            "lora_name", options=[NONE, *folder_paths.get_filename_list("loras")], default=NONE, optional=True,
            tooltip="A LoRA file. Not read when a lora is connected.",
        ),
    ]  # fmt: skip


def _optional() -> list[Any]:
    choices = weight_choices()
    return [
        *(io.Combo.Input(key, options=choices, default=NONE, optional=True, tooltip=text)
          for key, text in WEIGHTS.items()),
        io.Combo.Input(
            "judge_kind", options=["instance", "style"], default="instance", optional=True,
            tooltip="What the concept is, for the judge: a subject, or a style.",
        ),
        io.LoraModel.Input("lora", optional=True, tooltip="A LoRA from D-OPSD Train LoRA, without saving it first."),
        ConditionsSocket.Input(
            "conditions", optional=True,
            tooltip="From Build Teacher Condition: measures the gap to the teacher on its preview prompts.",
        ),
        io.Clip.Input(
            "judge", optional=True,
            tooltip="VLM-J: a Qwen3-VL from Load CLIP, which grades how similar images are to their source.",
        ),
    ]  # fmt: skip
