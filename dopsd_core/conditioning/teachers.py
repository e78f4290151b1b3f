"""Teacher views: how the teacher, the same model, sees the target image (arXiv 2605.05204, section 3).

    vlm          a vision tower encodes the image, and the text encoder reads it together with the caption
    edit         the model's own editing branch gets the image as reference and the instruction to stay consistent
    edit_target  for edit LoRAs: both get the source as reference, the teacher also the target
    words        for sliders: no image, the teacher reads the caption with other words ("face -> smiling face")

Student and teacher differ only in this view and, for an EMA teacher, in their weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

NO_SENTENCE = "-"
TEACHER_SENTENCE = "dopsd_teacher_sentence"
"""Key of the sentence in the header of a LoRA."""
ARROW = "->"

_OTHER_ARROW = re.compile("=>|[\u2190-\u21ff\u2794-\u27be\u27f5-\u27ff\u2b05-\u2b11]")
"""Arrows that are not read as `ARROW`, such as => and those of Unicode."""

_LETTER = r"[^\W_\u0e00-\u0fff\u1000-\u11ff\u1780-\u17ff\u3040-\u9fff\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
"""A letter or digit of the scripts that write spaces around words, which Chinese, Japanese and Thai do not; a Korean
word is followed by its ending without one."""

Background = Literal["keep", "blur", "grey", "remove"]
"""What the teacher sees around the subject, where an image has a mask; "remove" leaves white."""


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """What the teacher sees in addition to the caption.

    Attributes:
        name: how it is chosen.
        sees: the image in the text features, or as a reference latent; or nothing.
        sentence: appended to the caption in the teacher's text; "a -> b" writes b in place of a instead, for a teacher
            that sees nothing.
        of_others: replaces `sentence` where the teacher sees other images than the pair's own, which share only the
            subject.
        edits: whether student and teacher get the pair's source images as references; needs data with sources.
        background: what it sees around the subject.
    """

    name: str
    sees: Literal["features", "reference", "nothing"]
    sentence: str = ""
    of_others: str = ""
    edits: bool = False
    background: Background = "keep"

    @property
    def replaces(self) -> tuple[str, str] | None:
        """(words of the caption, what the teacher reads in their place); None if it reads the caption's own."""
        if self.sees != "nothing" or ARROW not in self.sentence:
            return None
        words, _, others = self.sentence.partition(ARROW)
        return words.strip(), others.strip()

    def text(self, caption: str) -> str:
        """The teacher's text for a caption."""
        if self.replaces:
            words, others = self.replaces
            return _whole(words).sub(lambda _: others, caption)
        return f"{caption} {self.sentence}".strip() if self.sentence else caption

    @property
    def remark(self) -> str:
        """What it does besides reading the caption, for a sheet of images."""
        if self.sees == "nothing":
            return "reads other words"
        return "sees a wanted result" if self.edits else "sees a training image"

    @property
    def facts(self) -> dict[str, str]:
        """What a LoRA's header says of it: its name, and background and sentence if they are not the usual ones."""
        usual = TEACHER_VIEWS[self.name]
        facts = {"dopsd_teacher_sees": self.name}
        if self.background != "keep":
            facts["dopsd_teacher_background"] = self.background
        if self.sentence not in (usual.sentence, usual.of_others):
            facts[TEACHER_SENTENCE] = self.sentence or NO_SENTENCE
        return facts

    def teaches(self, caption: str) -> bool:
        """Whether student and teacher differ for this caption."""
        return self.sees != "nothing" or self.text(caption) != caption

    def with_sentence(self, sentence: str, others: bool = False) -> TeacherView:
        """Sets the user's sentence; "" keeps the default, "-" removes it.

        others: whether the teacher sees other images than the pair's own.

        Raises:
            ValueError: the teacher uses a vision tower and reads only the caption, or sees nothing and reads nothing
                else either.
        """
        sentence = sentence.strip()
        if self.sees == "nothing":
            return self._with_words(sentence)
        if not sentence:
            others = others or self.background != "keep"  # then the sentence may not name the background either
            return replace(self, sentence=self.of_others) if others and self.of_others else self
        if self.sees == "features" and sentence != NO_SENTENCE:
            raise ValueError(f"the teacher {self.name!r} reads only the caption; leave its sentence empty")
        return replace(self, sentence="" if sentence == NO_SENTENCE else sentence)

    def _with_words(self, sentence: str) -> TeacherView:
        words, arrow, others = (part.strip() for part in sentence.partition(ARROW))
        if sentence in ("", NO_SENTENCE) or (arrow and (not words or words == others)):
            raise ValueError(
                f"the teacher {self.name!r} sees no image: write in teacher_sentence what it reads that the student "
                f"does not, such as {'face -> smiling face'!r} for captions with the word face; it is {sentence!r}"
            )
        if ARROW in others or (other := _OTHER_ARROW.search(sentence)):
            wrong = "several arrows" if ARROW in others else f"the arrow {other.group()}" if other else ""
            raise ValueError(
                f"teacher_sentence {sentence!r} has {wrong}: write one {ARROW} between the words of the captions and "
                "what the teacher reads in their place"
            )
        return replace(self, sentence=sentence)

    def with_background(self, background: Background) -> TeacherView:
        """Sets what it sees around the subject; call it before `with_sentence`, whose default depends on it.

        Raises:
            ValueError: the teacher sees the wanted result of an edit, which is whole, or no image.
        """
        if self.sees == "nothing" and background != "keep":
            raise ValueError(f"the teacher {self.name!r} sees no image: set teacher_background to keep")
        if self.edits and background != "keep":
            raise ValueError(
                f"the teacher {self.name!r} sees the wanted result of an edit, whose background belongs to it: set "
                "teacher_background to keep"
            )
        return replace(self, background=background)


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
"""The authors' sentences have the same meaning."""

WORDS = TeacherView(name="words", sees="nothing")
"""Not the paper's: a slider, as of arXiv 2311.12092, taught along the student's own steps. Every model has it."""

TEACHER_VIEWS: Mapping[str, TeacherView] = {teacher.name: teacher for teacher in (VLM, EDIT, EDIT_TARGET, WORDS)}


def choose_teacher(known: Sequence[str], mode: str, edits: bool) -> TeacherView:
    """The teacher view for `mode`, which is "auto" or a name.

    Args:
        known: the views that the model supports, the default first.
        edits: whether the data has source images; decides for "auto".

    Raises:
        ValueError: the model does not support it; the message lists those that it supports.
    """
    fitting = [name for name in known if TEACHER_VIEWS[name].edits == edits]
    if mode == "auto" and fitting:
        return TEACHER_VIEWS[fitting[0]]
    if mode == "auto":
        raise ValueError(
            "this model has no teacher for images with sources: load only the folder of the targets, or choose a model "
            "that edits, such as FLUX.2-klein"
        )
    known = (*known, WORDS.name)
    if mode not in known:
        raise ValueError(f"this model has no teacher {mode!r}; choose one of: {', '.join(('auto', *known))}")
    return TEACHER_VIEWS[mode]


def _whole(words: str) -> re.Pattern[str]:
    """Finds the words where they are no part of longer ones; in Chinese, which has no spaces, everywhere."""
    first = f"(?<!{_LETTER})" if re.match(_LETTER, words[:1]) else ""
    last = f"(?!{_LETTER})" if re.match(_LETTER, words[-1:]) else ""
    return re.compile(f"{first}{re.escape(words)}{last}")
