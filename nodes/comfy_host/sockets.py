"""The socket types of our nodes, and the values that pass through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.conditioning.teachers import TeacherView
from ...dopsd_core.data.dataset import ORDINARY_WORDS, DatasetReport, Pair
from ...dopsd_core.data.resolutions import Scale, every_image
from ...dopsd_core.data.triggers import concepts_of
from ...dopsd_core.families import Family
from ...dopsd_core.training.shown_images import TeacherImage
from ...dopsd_core.training.training_set import TrainingSet

if TYPE_CHECKING:
    from .vision import TeacherVision

__all__ = [
    "CATEGORY",
    "Conditions",
    "ConditionsSocket",
    "Dataset",
    "DatasetSocket",
    "PreviewPrompt",
    "SettingsSocket",
    "TeacherVision",
    "TrainedLora",
    "VisionSocket",
]

CATEGORY = "D-OPSD"

DatasetSocket = io.Custom("DOPSD_DATASET")
ConditionsSocket = io.Custom("DOPSD_CONDITIONS")
VisionSocket = io.Custom("DOPSD_VISION")
SettingsSocket = io.Custom("DOPSD_SETTINGS")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A checked dataset.

    Attributes:
        report: the images and captions; without errors.
        trigger: the word that replaces `[V]` in prompts; "" where there are several concepts.
        caption_dropout: share of training samples with an empty caption.
        notes: what was given and is not read, and other warnings, one line each.
        scales: the images at each of several resolutions; empty for one.
    """

    report: DatasetReport
    trigger: str
    caption_dropout: float
    notes: tuple[str, ...] = ()
    scales: tuple[Scale, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every image once, at the largest resolution that it is trained at."""
        return every_image(self.report.pairs, self.scales)

    @property
    def notes_of_ordinary(self) -> tuple[str, ...]:
        """The notes, where these are regularisation images: without warnings that captions lack a name."""
        return tuple(note for note in self.notes if not note.endswith(ORDINARY_WORDS))

    @property
    def is_edits(self) -> bool:
        """Whether the images have source images."""
        return any(pair.source_images for pair in self.report.pairs)


@dataclass(frozen=True, eq=False)
class PreviewPrompt:
    """A prompt that previews draw.

    Attributes:
        text: the prompt.
        student: the encoded prompt; features [L, D].
        teacher: the same prompt, encoded with a training image.
        latent_shape: (C, h, w).
    """

    text: str
    student: Condition
    teacher: Condition
    latent_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Conditions:
    """Everything that training needs without the encoders.

    Attributes:
        family: the model family of CLIP and VAE.
        teacher: how the teacher sees the images.
        data: the encoded training set.
        pairs: the images and captions, each image once: one per example of `data` at the largest resolution, then
            those that only reach smaller ones.
        previews: the prompts that previews draw.
        trigger: as in `Dataset`.
        caption_dropout: as in `Dataset`.
        notes: for the user, one line each.
        teacher_image: whether the teacher sees the image being trained, or others.
    """

    family: Family
    teacher: TeacherView
    data: TrainingSet
    pairs: tuple[Pair, ...]
    previews: tuple[PreviewPrompt, ...]
    trigger: str
    caption_dropout: float
    notes: tuple[str, ...] = ()
    teacher_image: TeacherImage = "own"

    @property
    def concepts(self) -> tuple[str, ...]:
        """The triggers of the dataset, if there are several."""
        return concepts_of(example.concept for example in self.data.examples)

    def describe(self) -> str:
        """The counts, as text for the node."""
        data, ordinary = self.data, len(self.data.regularisation)
        return (
            (
                f"{self.family.title}, teacher {self.teacher.name}: {len(data.pairs)} pairs, "
                f"{len(set(data.anchors))} prior anchors, {len(self.previews)} preview prompts"
            )
            + (f", {ordinary} regularisation images" if ordinary else "")
            + self._of_concepts()
        )

    def _of_concepts(self) -> str:
        return f", {len(self.concepts)} concepts: {', '.join(self.concepts)}" if len(self.concepts) > 1 else ""


class TrainedLora(dict[str, Tensor]):
    """A LORA_MODEL: the tensors of a LoRA file by name, with alpha folded in, as ComfyUI's own loaders expect.

    Attributes:
        facts: metadata about the run, for the file's header.
    """

    def __init__(self, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.facts = dict(facts)
