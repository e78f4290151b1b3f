"""VLM-J: the questions to a vision-language model, and its answers as grades 1 to 4.

The wording is this project's own; the grades are the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

MAX_NEW_TOKENS = 32
"""Longest answer, in tokens; decoding is greedy."""

Ask = Callable[[Sequence[Tensor], str], str]
"""(images [3, H, W] in [0, 1], question) -> the model's answer."""


@dataclass(frozen=True)
class Question:
    """A question about a source image and a generated one.

    Attributes:
        text: what the model reads behind both images.
        labels: the answers, from grade 4 down to 1.
    """

    text: str
    labels: tuple[str, str, str, str]

    def grade(self, answer: str) -> int | None:
        """The grade 1..4 of the label that comes first in an answer; None if there is none."""
        found = [
            (match.start(), 4 - rank)
            for rank, label in enumerate(self.labels)
            if (match := re.search(rf"\b{label}\b", answer, re.IGNORECASE))
        ]
        return min(found)[1] if found else None


def _question(task: str, labels: tuple[str, str, str, str], meanings: Sequence[str]) -> Question:
    choices = "\n".join(f"- {label}: {meaning}" for label, meaning in zip(labels, meanings, strict=True))
    return Question(
        f"The first image is a reference, the second image was generated. {task}\n{choices}\n"
        "Answer with one of these four labels and nothing else.",
        labels,
    )


INSTANCE = _question(
    "Compare the main subject of both images. Ignore background, pose, lighting and artistic style. Which label fits?",
    ("SAME INSTANCE", "MOSTLY THE SAME", "PARTLY SIMILAR", "DIFFERENT INSTANCE"),
    (
        "it could be a photo of the very same individual or object",
        "the same individual or object, with small details that differ",
        "some features are shared, but it is recognisably another one",
        "another individual or object",
    ),
)
"""For concepts that are a subject."""

STYLE = _question(
    "Compare the visual style of both images: medium, line, colour palette, texture and shading. Ignore what they "
    "show. Which label fits?",
    ("HIGHLY CONSISTENT", "MOSTLY CONSISTENT", "SLIGHTLY CONSISTENT", "NOT CONSISTENT"),
    (
        "both could be works of one series",
        "the same style, with small differences",
        "a few elements of the style are shared",
        "another style",
    ),
)
"""For concepts that are a style."""

QUESTIONS = {"instance": INSTANCE, "style": STYLE}


class VlmJudge:
    """Grades generated images against their source, with any model that answers questions about images."""

    def __init__(self, ask: Ask, kind: str = "instance") -> None:
        self._ask, self._question = ask, QUESTIONS[kind]

    def __call__(self, source: Tensor, generated: Tensor) -> float:
        """The grade 1..4, higher is better; NaN if the answer has no label. Images [3, h, w], [3, H, W] in [0, 1]."""
        grade = self._question.grade(self._ask([source, generated], self._question.text))
        return float("nan") if grade is None else float(grade)
