"""Teachers: how the same model is shown the target image (arXiv 2605.05204, section 3).

    vlm          a vision tower sees the image, the text encoder reads it together with the caption
    edit         the model's own editing branch has the image as reference, and is told to stay consistent with it
    edit_target  for edit LoRAs: both have the source as reference, the teacher the wanted result besides

Student and teacher differ in nothing but this and, where it is an average, in their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

NO_SENTENCE = "-"


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """sees: the image in the text features, or as a reference latent. sentence: follows the caption, in the teacher's
    text only; of_others is its sentence for other images than the pair's own, which share the subject and no more.
    edits: student and teacher have the pair's source images as references; needs data with sources."""

    name: str
    sees: Literal["features", "reference"]
    sentence: str = ""
    of_others: str = ""
    edits: bool = False

    def text(self, caption: str) -> str:
        """The teacher's text."""
        return f"{caption} {self.sentence}".strip() if self.sentence else caption

    def with_sentence(self, sentence: str, others: bool = False) -> TeacherView:
        """With the user's sentence; "" keeps the teacher's own, "-" takes it out.

        others: it is shown other images than the pair's own.

        Raises:
            ValueError: the teacher sees through a vision tower and reads the caption alone.
        """
        sentence = sentence.strip()
        if not sentence:
            return replace(self, sentence=self.of_others) if others and self.of_others else self
        if self.sees == "features" and sentence != NO_SENTENCE:
            raise ValueError(f"the teacher {self.name!r} reads the caption alone; leave its sentence empty")
        return replace(self, sentence="" if sentence == NO_SENTENCE else sentence)


VLM = TeacherView(name="vlm", sees="features")
EDIT = TeacherView(
    name="edit",
    sees="reference",
    sentence="Keep the subject with its face and details, the background and the composition as in the reference "
    "image.",
    of_others="The subject is the one of the reference image, with its face and details.",
)
EDIT_TARGET = TeacherView(
    name="edit_target",
    sees="reference",
    sentence="The last reference image is the wanted result: starting from the first one, follow the instruction and "
    "make the output match the last one as closely as possible.",
    edits=True,
)
"""The authors' sentences say as much in other words."""

TEACHER_VIEWS: Mapping[str, TeacherView] = {teacher.name: teacher for teacher in (VLM, EDIT, EDIT_TARGET)}


def choose_teacher(known: Sequence[str], mode: str, edits: bool) -> TeacherView:
    """The teacher that `mode` means, "auto" or a name, where a model can have those of `known`, its default first.

    edits: whether the data has source images; "auto" goes by it.

    Raises:
        ValueError: the model cannot have it; the message lists those that it can have.
    """
    fitting = [name for name in known if TEACHER_VIEWS[name].edits == edits]
    if mode == "auto" and fitting:
        return TEACHER_VIEWS[fitting[0]]
    if mode not in known:
        why = " for images with sources" if mode == "auto" else ""
        raise ValueError(f"this model has no teacher {mode!r}{why}; choose one of: {', '.join(('auto', *known))}")
    return TEACHER_VIEWS[mode]
