"""What is known of a training set as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..data.encoding_plan import Example


@dataclass(frozen=True)
class MostTokens:
    """The largest numbers of (image, text) tokens of a forward; the two may belong to different pairs.

    Attributes:
        student: of the student, with the anchors.
        teacher: of the teacher.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]

    def or_more(self, other: MostTokens) -> MostTokens:
        """The larger numbers of both."""
        return MostTokens(most_of((self.student, other.student)), most_of((self.teacher, other.teacher)))


def most_of(tokens: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The largest number of each kind."""
    return max(image for image, _ in tokens), max(text for _, text in tokens)


def tuple_in_parts(pairs: int, anchors: int, examples: Sequence[Example]) -> Iterator[str]:
    """`repr((pairs, anchors, tuple(examples)))` piece by piece: there may be millions."""
    yield f"({pairs}, {anchors}, ("
    for number, example in enumerate(examples):
        yield f", {example!r}" if number else repr(example)
    yield ",))" if len(examples) == 1 else "))"
