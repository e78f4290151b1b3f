"""What travels between our nodes: socket types and the values on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.conditioning.teachers import TeacherView
from ...dopsd_core.data.dataset import DatasetReport, Pair
from ...dopsd_core.families import Family
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
    """A checked data set: no errors in `report`. trigger: the word for `[V]`. caption_dropout: share of visits."""

    report: DatasetReport
    trigger: str
    caption_dropout: float


@dataclass(frozen=True, eq=False)
class PreviewPrompt:
    """A prompt that previews draw. teacher: the same prompt seen with a training picture. latent_shape: (C, h, w)."""

    text: str
    student: Condition
    teacher: Condition
    latent_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Conditions:
    """Everything that training needs once the encoders have left.

    pairs: the pictures, one per example of `data`. teacher: how it is shown them. caption_dropout as in `Dataset`.
    notes: for the user, one line each.
    """

    family: Family
    teacher: TeacherView
    data: TrainingSet
    pairs: tuple[Pair, ...]
    previews: tuple[PreviewPrompt, ...]
    trigger: str
    caption_dropout: float
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Counts, for the node's text."""
        data = self.data
        return (
            f"{self.family.title}, teacher {self.teacher.name}: {len(data.pairs)} pairs, "
            f"{len(set(data.anchors))} prior anchors, {len(self.previews)} preview prompts"
        )


class TrainedLora(dict[str, Tensor]):
    """LORA_MODEL: the tensors of a LoRA file, alpha folded in, as ComfyUI's own loaders take them.

    facts: about the run, for the file's header.
    """

    def __init__(self, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.facts = dict(facts)
