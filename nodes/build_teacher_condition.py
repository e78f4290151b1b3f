"""The node Build Teacher Condition: encodes what student and teacher see, once before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import comfy.utils
from comfy_api.latest import io

from ..dopsd_core.conditioning.cache import ConditionCache
from ..dopsd_core.conditioning.teachers import TEACHER_VIEWS, Background, TeacherView
from ..dopsd_core.data.captions import check_prompts, put_trigger
from ..dopsd_core.data.dataset import Pair
from ..dopsd_core.data.encoding_plan import plan_encoding
from ..dopsd_core.training.anchors import ordinary_prompts
from ..dopsd_core.training.prompt_remarks import anchor_remarks, equal_rows_remarks, slider_remarks
from ..dopsd_core.training.regularisation import check_regularisation
from ..dopsd_core.training.shown_images import TeacherImage, mask_remarks
from ..dopsd_core.training.training_set import TrainingSet, build_training_set
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.embeddings import embedding_notes, embeddings_fingerprint
from .comfy_host.encoder import ComfyEncoder, new_encoder, teacher_for
from .comfy_host.lengths import length_notes
from .comfy_host.paths import condition_cache
from .comfy_host.previews import encode_previews, preview_texts, split_lines
from .comfy_host.report import Notes
from .comfy_host.sockets import CATEGORY, Conditions, ConditionsSocket, Dataset, DatasetSocket, VisionSocket
from .comfy_host.vision import has_tower


@dataclass(frozen=True)
class Wanted:
    """What the node was asked for besides images and models, by the names of its inputs.

    Attributes:
        mode: how the teacher sees the images.
        preview_prompts: the prompts for previews, one per line.
        anchor_prompts: the prompts for the prior anchor, one per line.
        teacher_image: which image the teacher sees.
        teacher_sentence: the sentence that only the teacher reads.
        teacher_background: what the teacher sees around the subject.
    """

    mode: str
    preview_prompts: str
    anchor_prompts: str
    teacher_image: TeacherImage
    teacher_sentence: str
    teacher_background: Background

    def sentence(self, trigger: str) -> str:
        """The teacher's sentence with `[V]` replaced."""
        return put_trigger(self.teacher_sentence, trigger)

    def teacher(self, encoder: ComfyEncoder, dataset: Dataset) -> TeacherView:
        """The teacher for the encoder's family and this dataset.

        Raises:
            ValueError: there is no such teacher, or it lacks a vision tower.
        """
        sentence, others = self.sentence(dataset.trigger), self.teacher_image == "other"
        return teacher_for(encoder, self.mode, dataset.is_edits, sentence, others, self.teacher_background)


def build_conditions(
    dataset: Dataset,
    regularisation: Sequence[Pair],
    encoder: ComfyEncoder,
    cache: ConditionCache,
    teacher: TeacherView,
    wanted: Wanted,
) -> Conditions:
    """Everything that training and previews need, encoded or read from the cache.

    regularisation: ordinary images, whose captions are prior anchors too.

    Raises:
        ValueError: the dataset does not fit the teacher, or a prompt is not valid text.
    """
    pairs = dataset.pairs
    texts = preview_texts(wanted.preview_prompts, pairs, dataset.trigger)
    trained = {caption for pair in pairs for caption in pair.captions}
    unseen = next((text for text in texts if text not in trained and teacher.teaches(text)), None)
    data: TrainingSet = build_training_set(
        pairs,
        encoder,
        cache,
        teacher=teacher,
        teacher_image=wanted.teacher_image,
        trigger=dataset.trigger,
        caption_dropout=dataset.caption_dropout > 0,
        anchors=True,
        anchor_prompts=split_lines(wanted.anchor_prompts),
        regularisation=regularisation,
        heldout_caption=unseen,
        scales=dataset.scales,
        on_encoded=_progress(),
    )
    ordinary = ordinary_prompts(split_lines(wanted.anchor_prompts), regularisation, dataset.trigger)
    lengths = length_notes(encoder, teacher, pairs, wanted.teacher_image, texts, dataset.report.source)
    return Conditions(
        family=encoder.family,
        teacher=teacher,
        data=data,
        pairs=pairs,
        previews=encode_previews(texts, pairs, encoder, cache, teacher, wanted.teacher_image),
        trigger=dataset.trigger,
        caption_dropout=dataset.caption_dropout,
        notes=(
            *lengths,
            *mask_remarks(pairs, teacher.background),
            *slider_remarks(ordinary, teacher, plan_encoding(pairs, trigger=dataset.trigger).anchors),
            *equal_rows_remarks(texts, teacher),
        ),
        teacher_image=wanted.teacher_image,
    )


def _progress() -> Callable[[int, int, bool], None]:
    """A callback (done, total, from the cache) that moves the node's progress bar."""
    bars: dict[int, Any] = {}

    def show(done: int, total: int, _: bool) -> None:
        bars.setdefault(total, comfy.utils.ProgressBar(total)).update_absolute(done, total)

    return show


def prompt_remarks(wanted: Wanted, dataset: Dataset) -> list[str]:
    """Warnings about the texts that a user typed.

    Raises:
        ValueError: a text has characters that are not valid.
    """
    trigger = dataset.trigger
    texts = {"preview prompt": split_lines(wanted.preview_prompts), "teacher_sentence": [wanted.teacher_sentence]}
    found = [remark for what, prompts in texts.items() for remark in check_prompts(prompts, what, trigger)]
    names = list(dict.fromkeys(filter(None, (trigger, *dataset.report.concepts))))
    captions = {text for pair in dataset.pairs if not pair.source_images for text in pair.captions}
    anchors = [put_trigger(line, trigger) for line in split_lines(wanted.anchor_prompts)]
    found += anchor_remarks(anchors, names, captions)
    return found


def named_texts(pairs: Sequence[Pair], wanted: Wanted, sentence: str) -> Iterator[tuple[str, str]]:
    """(what it is, the text) of every text that is encoded, for notes.

    Args:
        pairs: with the regularisation images.
        sentence: the teacher's.
    """
    for pair in pairs:
        yield from ((f"the caption of {pair.image_path.name}", caption) for caption in pair.captions)
    for kind, texts in (("preview", wanted.preview_prompts), ("anchor", wanted.anchor_prompts)):
        yield from ((f"{kind} prompt {number}", text) for number, text in enumerate(split_lines(texts), 1))
    yield "teacher_sentence", sentence


def unused_of_regularisation(dataset: Dataset) -> tuple[str, ...]:
    """One line for each setting of the regularisation images' Load Dataset that is not used."""
    notes = []
    if dataset.trigger:
        notes.append(
            f"regularisation: ordinary captions need no trigger: leave {dataset.trigger} out of its Load Dataset, "
            "whose warnings about captions without it do not count"
        )
    if dataset.caption_dropout:
        notes.append(f"regularisation: caption_dropout {dataset.caption_dropout:g} of its Load Dataset is not used")
    if len(dataset.scales) > 1:
        notes.append("regularisation: its resolutions have no shares: each image has the largest that it reaches")
    return tuple(notes)


def unused_encoders(teacher: TeacherView, clip: Any, vision: Any | None) -> tuple[str, ...]:
    """One line for each input of Build Teacher Condition that is not used."""
    notes = []
    if vision is not None and teacher.sees == "nothing":
        notes.append(f"vision is not used: the teacher {teacher.name} sees no image")
    elif vision is not None and teacher.sees != "features":
        notes.append(f"vision is not used: the teacher {teacher.name} sees through the model's editing branch")
    elif vision is not None and has_tower(clip):
        notes.append("vision is not used: the text encoder has a vision tower")
    if clip.use_clip_schedule or clip.apply_hooks_to_conds:
        notes.append("the hooks on the CLIP are not used: captions are encoded without a schedule")
    return tuple(notes)


class BuildTeacherCondition(io.ComfyNode):
    """Encodes every image and caption once, for student and teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_BuildTeacherCondition",
            display_name="Build Teacher Condition",
            category=CATEGORY,
            description="Encodes every image and caption once: the student reads the caption only, the teacher "
            "reads it and also sees the image. Results are cached on disk, so the text encoder can leave memory.",
            search_aliases=["d-opsd", "dual conditioning", "train lora"],
            inputs=_inputs(),
            outputs=[
                ConditionsSocket.Output(display_name="conditions", tooltip="For Teacher Preview and D-OPSD Train LoRA.")
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.dynprompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Changes when an embedding is replaced, so that ComfyUI runs the node again."""
        return embeddings_fingerprint()

    @classmethod
    @checked
    def execute(
        cls, dataset, clip, vae, vision=None, regularisation: Dataset | None = None, **widgets: Any
    ) -> io.NodeOutput:
        """Encodes the dataset and the prompts, and shows counts and notes on the node; `widgets` as in `Wanted`."""
        wanted, pairs, warnings = Wanted(**widgets), dataset.report.pairs, Notes()
        ordinary = regularisation.report.pairs if regularisation else ()
        theirs = regularisation.notes_of_ordinary if regularisation else ()
        remarks = prompt_remarks(wanted, dataset)
        remarks += check_regularisation(ordinary, pairs, dataset.trigger)
        with warnings.with_warnings():
            encoder = new_encoder(clip, vae, vision)
            teacher = wanted.teacher(encoder, dataset)
            cache = ConditionCache(condition_cache())
            conditions = build_conditions(dataset, ordinary, encoder, cache, teacher, wanted)
        notes = Notes((*conditions.notes, *(f"warning: {remark}" for remark in remarks)))
        notes.add(*embedding_notes(clip, named_texts((*pairs, *ordinary), wanted, wanted.sentence(dataset.trigger))))
        notes.add(*(unused_of_regularisation(regularisation) if regularisation else ()))
        notes.add(*unused_encoders(teacher, clip, vision), *encoder.notes, *warnings.lines)
        send_text(cls, "\n".join((conditions.describe(), *notes.lines)))
        return io.NodeOutput(replace(conditions, notes=(*dataset.notes, *theirs, *notes.lines)))


def _inputs() -> list[Any]:
    return [
        DatasetSocket.Input("dataset", tooltip="Images and captions, from Load Dataset (D-OPSD)."),
        io.Clip.Input("clip", tooltip="The model's own text encoder, as for ordinary prompts."),
        io.Vae.Input("vae", tooltip="The model's own VAE; it encodes each training image into a latent."),
        io.Combo.Input(
            "mode",
            options=["auto", *TEACHER_VIEWS],
            default="auto",
            optional=True,
            tooltip="How the teacher sees the image. vlm: through Qwen3-VL's vision tower and the model's own "
            "text encoder (Z-Image-Turbo, FLUX.2-klein 4B, Krea 2 Turbo). edit: as reference image of the model's "
            "editing branch (FLUX.2-klein). edit_target: for edit LoRAs, whose dataset has source images. words: no "
            "image but other words, for a slider; see the help. auto: the best one for this model and dataset.",
        ),
        io.String.Input(
            "preview_prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="Validation prompts, one per line, drawn as previews during training; [V] stands for the "
            "trigger. The first one that is not a training caption is the unseen prompt, on which the gap is "
            "measured too. At most 32. Empty: the first captions.",
        ),
        io.String.Input(
            "anchor_prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="Ordinary prompts, one per line, whose images should not change (prior anchor, against "
            "forgetting and leakage). Your captions without the trigger are used as well.",
        ),
        *_optional_inputs(),
    ]


def _optional_inputs() -> list[Any]:
    return [
        VisionSocket.Input(
            "vision",
            optional=True,
            tooltip="The teacher's vision tower, from Load Teacher Vision (Qwen3-VL-4B) or Load Demo Models. "
            "Only needed for the mode vlm, and not for Krea 2, whose text encoder has a vision tower.",
        ),
        io.Combo.Input(
            "teacher_image",
            options=list(get_args(TeacherImage)),
            default="own",
            optional=True,
            advanced=True,
            tooltip="Which image the teacher sees. own: the one being trained. other: up to three other "
            "images of the dataset in turn, so that it cannot copy; for one subject in different places.",
        ),
        io.String.Input(
            "teacher_sentence",
            multiline=True,
            default="",
            optional=True,
            advanced=True,
            tooltip="A sentence that only the teacher reads, after the caption, in the modes edit and "
            "edit_target. Empty: a default sentence that asks it to follow the reference image. A single - : "
            "no sentence. In the mode words: what it reads in place of the caption's words, such as face -> smiling "
            "face.",
        ),
        DatasetSocket.Input(
            "regularisation",
            optional=True,
            tooltip="Ordinary images with captions, which should not change, from a second Load Dataset. Their "
            "captions are prior anchors too; with the objective dreambooth the images are its class images, and none "
            "are drawn.",
        ),
        io.Combo.Input(
            "teacher_background",
            options=list(get_args(Background)),
            default="keep",
            optional=True,
            advanced=True,
            tooltip="What the teacher sees around the subject of images with a mask: a.mask.png beside a.png, white "
            "where the subject is, or the image's transparency. keep: the whole image. blur, grey, remove (white): the "
            "subject alone, so that it cannot copy the background. Look at Teacher Preview.",
        ),
    ]
