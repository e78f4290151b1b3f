"""The node that encodes what student and teacher are given, once for all of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import comfy.utils
from comfy_api.latest import io

from ..dopsd_core.conditioning.cache import ConditionCache
from ..dopsd_core.conditioning.teachers import TEACHER_VIEWS, TeacherView
from ..dopsd_core.data.captions import check_prompts, has_trigger, put_trigger
from ..dopsd_core.training.training_set import TeacherImage, TrainingSet, build_training_set
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.encoder import ComfyEncoder, teacher_for
from .comfy_host.lengths import length_notes
from .comfy_host.paths import condition_cache
from .comfy_host.previews import encode_previews, preview_texts, split_lines
from .comfy_host.report import Notes
from .comfy_host.sockets import CATEGORY, Conditions, ConditionsSocket, Dataset, DatasetSocket, VisionSocket


def build_conditions(
    dataset: Dataset,
    encoder: ComfyEncoder,
    cache: ConditionCache,
    teacher: TeacherView,
    teacher_image: TeacherImage,
    previews: str,
    anchors: str,
) -> Conditions:
    """Everything that training and previews need, encoded or from the cache."""
    pairs = dataset.report.pairs
    texts = preview_texts(previews, pairs, dataset.trigger)
    trained = {caption for pair in pairs for caption in pair.captions}
    unseen = next((text for text in texts if text not in trained), None)
    bar: list[Any] = []

    def told(done: int, total: int, _: bool) -> None:
        if not bar:
            bar.append(comfy.utils.ProgressBar(total))
        bar[0].update_absolute(done, total)

    data: TrainingSet = build_training_set(
        pairs,
        encoder,
        cache,
        teacher=teacher,
        teacher_image=teacher_image,
        trigger=dataset.trigger,
        caption_dropout=dataset.caption_dropout > 0,
        anchors=True,
        anchor_prompts=split_lines(anchors),
        heldout_caption=unseen,
        on_encoded=told,
    )
    prompts = encode_previews(texts, pairs, encoder, cache, teacher, teacher_image)
    notes = length_notes(encoder, teacher, pairs, teacher_image, texts, dataset.report.source)
    return Conditions(encoder.family, teacher, data, pairs, prompts, dataset.trigger, dataset.caption_dropout, notes)


def prompt_remarks(previews: str, anchors: str, sentence: str, trigger: str) -> list[str]:
    """What is doubtful in the texts that a user typed, as warnings.

    Raises:
        ValueError: one holds characters that are no text.
    """
    texts = {
        "preview prompt": split_lines(previews),
        "anchor prompt": split_lines(anchors),
        "teacher_sentence": [sentence],
    }
    found = [remark for what, prompts in texts.items() for remark in check_prompts(prompts, what, trigger)]
    for number, prompt in enumerate(texts["anchor prompt"], 1):
        if has_trigger(prompt, trigger):
            found.append(
                f"anchor prompt {number}: it names the concept, which training would hold back: take the name out"
            )
    return [f"warning: {message}" for message in found]


def unused_encoders(teacher: TeacherView, clip: Any, vision: Any | None) -> tuple[str, ...]:
    """One line for each thing that was given to Build Teacher Condition and is not used."""
    notes = []
    if vision is not None and teacher.sees != "features":
        notes.append(f"vision is not used: the teacher {teacher.name} sees through the model's editing branch")
    if clip.use_clip_schedule or clip.apply_hooks_to_conds:
        notes.append("the hooks on the CLIP are not used: captions are encoded without a schedule")
    return tuple(notes)


class BuildTeacherCondition(io.ComfyNode):
    """Encodes every pair once, for student and teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_BuildTeacherCondition",
            display_name="Build Teacher Condition",
            category=CATEGORY,
            description="Encodes every picture and caption once: the student reads the caption alone, the teacher "
            "reads it and looks at the picture. Results are kept on disk; then the text encoder may leave memory.",
            search_aliases=["d-opsd", "dual conditioning", "train lora"],
            inputs=[
                DatasetSocket.Input("dataset", tooltip="Pictures and captions, from Load Dataset (D-OPSD)."),
                io.Clip.Input("clip", tooltip="The model's own text encoder, as for ordinary prompts."),
                io.Vae.Input("vae", tooltip="The model's own VAE; it gives each training picture its latent."),
                io.Combo.Input(
                    "mode",
                    options=["auto", *TEACHER_VIEWS],
                    default="auto",
                    optional=True,
                    tooltip="How the teacher sees the picture. vlm: through Qwen3-VL's eyes, read by the model's own "
                    "text encoder (Z-Image-Turbo, FLUX.2-klein 4B). edit: as reference image of the model's editing "
                    "branch (FLUX.2-klein). edit_target: for edit LoRAs, whose data has source pictures. auto: the "
                    "model's best for the data.",
                ),
                io.String.Input(
                    "preview_prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Prompts to draw during training, one per line; [V] stands for the trigger. The first that "
                    "is no training caption also measures how far the concept carries. Empty: the first captions.",
                ),
                io.String.Input(
                    "anchor_prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Ordinary prompts, one per line, whose pictures shall stay as they are (prior anchor). "
                    "Your captions with the trigger taken out are used as well.",
                ),
                VisionSocket.Input(
                    "vision",
                    optional=True,
                    tooltip="The teacher's eyes: Load Teacher Vision (Qwen3-VL-4B) or Load Demo Models. The mode vlm "
                    "needs it.",
                ),
                io.Combo.Input(
                    "teacher_image",
                    options=list(get_args(TeacherImage)),
                    default="own",
                    optional=True,
                    advanced=True,
                    tooltip="Which picture the teacher is shown. own: the one being trained. other: up to three others "
                    "of the data set in turn, so that it cannot copy; for subjects shown in different places.",
                ),
                io.String.Input(
                    "teacher_sentence",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What the teacher is told after the caption, in the modes edit and edit_target. Empty: a "
                    "sentence that asks it to keep to the reference image. A single - : nothing.",
                ),
            ],
            outputs=[
                ConditionsSocket.Output(display_name="conditions", tooltip="For Teacher Preview and D-OPSD Train LoRA.")
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    @checked
    def execute(
        cls,
        dataset,
        clip,
        vae,
        mode,
        preview_prompts,
        anchor_prompts,
        vision=None,
        teacher_image: TeacherImage = "own",
        teacher_sentence="",
    ) -> io.NodeOutput:
        remarks = prompt_remarks(preview_prompts, anchor_prompts, teacher_sentence, dataset.trigger)
        edits = any(pair.source_images for pair in dataset.report.pairs)
        warnings = Notes()
        with warnings.with_warnings():
            encoder = ComfyEncoder(clip, vae, vision)
            sentence = put_trigger(teacher_sentence, dataset.trigger)
            teacher = teacher_for(encoder, mode, edits, sentence, teacher_image == "other")
            cache = ConditionCache(condition_cache())
            conditions = build_conditions(
                dataset, encoder, cache, teacher, teacher_image, preview_prompts, anchor_prompts
            )
        notes = Notes((*conditions.notes, *remarks, *unused_encoders(teacher, clip, vision), *encoder.notes))
        notes.add(*warnings.lines)
        send_text(cls, "\n".join((conditions.describe(), *notes.lines)))
        return io.NodeOutput(replace(conditions, notes=notes.lines))
