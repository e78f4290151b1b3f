"""The question to a vision-language model for the caption of a training image, and the caption in its answer.

A caption names the concept `[V]` and describes everything but what makes the concept itself: what the words say, `[V]`
does not have to learn. The wording is this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..options import Hint, Options
from .captions import PLACEHOLDER, CaptionError, check_text, has_trigger, is_blank, mend_placeholder, with_placeholder

if TYPE_CHECKING:
    from torch import Tensor

Ask = Callable[["Tensor", str], str]
"""(image [3, H, W] in [0, 1], question) -> the model's answer."""

Aim = Literal["subject", "style"]
Language = Literal["English", "Chinese"]

_TOKENS_PER_WORD, _SPARE_TOKENS = 3, 32
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_HEADING = re.compile(r"(?i)^(?:(?:image |photo )?captions?|descriptions?|图片描述|描述|标题)\s*[:：]\s*")
_QUOTES = ('""', "''", "``", "“”", "‘’", "「」")


class CaptionOptions(Options):
    """What captions should say."""

    aim: Aim = Field(
        default="subject",
        description="what [V] stands for: a subject, whose looks the captions leave out, or a style, whose medium, "
        "line and colours they leave out",
    )
    class_word: str = Field(
        default="", description="what the subject is in ordinary words, such as dog; the captions write [V] dog"
    )
    trigger: str = Field(
        default="", description="the trigger word, if captions that are there already use it in place of [V]"
    )
    instruction: str = Field(
        default="", description="a further instruction to the model, such as: name the camera angle"
    )
    language: Language = Field(default="English", description="language of the captions")
    max_words: Annotated[int, Hint(step=1)] = Field(
        default=40, ge=5, le=200, description="longest caption in words; in Chinese twice as many characters"
    )

    @property
    def max_tokens(self) -> int:
        """The longest answer in tokens."""
        return _TOKENS_PER_WORD * self.max_words + _SPARE_TOKENS

    @property
    def name(self) -> str:
        """The concept as a caption names it: "[V] dog", or "[V]"."""
        return f"{PLACEHOLDER} {self.class_word.strip()}".strip() if self.aim == "subject" else PLACEHOLDER

    def question(self) -> str:
        """What the model reads behind the image."""
        chinese = self.language == "Chinese"
        length = f"{2 * self.max_words} characters" if chinese else f"{self.max_words} words"
        language = "Simplified Chinese" if chinese else "English"
        lines = [
            f"Write one caption for this image in {language}, at most {length} long. It trains an image generator.",
            *(self._about_subject() if self.aim == "subject" else self._about_style()),
            self.instruction.strip(),
            "Answer with the caption alone.",
        ]
        return "\n".join(filter(None, lines))

    def _about_subject(self) -> tuple[str, ...]:
        kind = self.class_word.strip()
        what = f"one particular {kind}, which is called {PLACEHOLDER}" if kind else f"called {PLACEHOLDER}"
        return (
            f"Its main subject is {what}. Write {self.name} for it.",
            f"Do not say what {PLACEHOLDER} looks like: none of its colours, shapes, materials, markings, parts, face "
            "or hair, nor anything else that it always has.",
            "Do say everything else: what it does, its pose and place, the other things, the background, the light and "
            "the camera angle.",
        )

    def _about_style(self) -> tuple[str, ...]:
        return (
            f"The image is in a style that is called {PLACEHOLDER}. Say only what is shown: who and what, what "
            "happens, the place and the composition.",
            "Do not describe the style: neither the medium and technique, nor lines, brushwork, texture, palette, "
            "shading and mood.",
            f"End the caption with: {self._ending()}",
        )

    def _ending(self) -> str:
        return f"{PLACEHOLDER}风格" if self.language == "Chinese" else f"in the style of {PLACEHOLDER}"

    def caption(self, answer: str) -> tuple[str, tuple[str, ...]]:
        """(the caption in the model's answer on one line, remarks about it).

        Raises:
            CaptionError: the answer has no text, or characters that are not valid.
        """
        text = with_placeholder(mend_placeholder(_bare(answer)), self.trigger)  # the instruction may name it
        check_text(text)
        if is_blank(text):
            raise CaptionError("the model's answer is empty: write this caption yourself, or change the instruction")
        if has_trigger(text):
            return text, ()
        return self._named(text), (f"the model left out {PLACEHOLDER}, which was put in: check where it is",)

    def _named(self, text: str) -> str:
        """The caption with the concept's name put in: before its class word, at the end of a style's, else in front."""
        if self.aim == "style":
            comma = "，" if self.language == "Chinese" else ", "
            return f"{text.rstrip(' .。,，')}{comma}{self._ending()}"
        kind = self.class_word.strip()
        found = re.search(rf"(?i)(?<![A-Za-z]){re.escape(kind)}(?![A-Za-z])", text) if kind else None
        if found:
            space = "" if self.language == "Chinese" else " "
            return f"{text[: found.start()]}{PLACEHOLDER}{space}{text[found.start() :]}"
        return f"{self.name}{'，' if self.language == 'Chinese' else ', '}{text}"


def _bare(answer: str) -> str:
    """The answer on one line, without thoughts, heading and quotes."""
    text = " ".join(_THOUGHTS.sub("", answer).replace("**", "").split())
    before = None
    while text != before:
        before, text = text, _HEADING.sub("", text).strip()
        for first, last in _QUOTES:
            inner = text[1:-1]
            if len(text) > 1 and text[0] == first and text[-1] == last and first not in inner and last not in inner:
                text = inner.strip()
    return text
