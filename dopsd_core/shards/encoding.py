"""How a dataset was encoded: what must be the same for all its shards, and for the training on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..conditioning.cache import FORMAT
from ..conditioning.teachers import TEACHER_VIEWS, TeacherView


@dataclass(frozen=True)
class Encoding:
    """Everything that decides what the encoder makes of an image and its captions.

    Attributes:
        encoder: identity of text encoder, vision tower and VAE with their settings.
        family: name of the model's family.
        teacher: name of the teacher's view.
        sentence: of that view.
        background: of that view.
        trigger: replaces `[V]` in the captions.
        resolution: images have about this x this pixels.
        multiple: their sides are multiples of it.
        empty_captions: whether the empty caption is encoded too, for caption dropout.
        heldout: the held-out caption; "" if there is none.
        preprocessing: version of everything else.
    """

    encoder: str
    family: str
    teacher: str
    sentence: str
    background: str
    trigger: str
    resolution: int
    multiple: int
    empty_captions: bool = False
    heldout: str = ""
    preprocessing: str = FORMAT

    @classmethod
    def of(
        cls, encoder: str, family: str, view: TeacherView, *, trigger: str, resolution: int, multiple: int,
        empty_captions: bool = False, heldout: str = "",
    ) -> Encoding:  # fmt: skip
        """The encoding for a teacher's view."""
        return cls(
            encoder, family, view.name, view.sentence, view.background, trigger, resolution, multiple, empty_captions,
            heldout,
        )  # fmt: skip

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> Encoding:
        """The encoding of an index.

        Raises:
            TypeError: fields are missing, or not known.
        """
        found = cls(**facts)  # type: ignore[arg-type]
        kinds = {"int": int, "bool": bool, "str": str}
        if wrong := [f.name for f in fields(cls) if type(getattr(found, f.name)) is not kinds[str(f.type)]]:
            raise TypeError(f"{wrong[0]} is {getattr(found, wrong[0])!r}")
        return found

    def view(self) -> TeacherView:
        """The teacher's view; raises KeyError if it is not known."""
        background: Any = self.background
        return replace(TEACHER_VIEWS[self.teacher], sentence=self.sentence, background=background)

    def digest(self) -> str:
        """A digest of all of it, in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Encoding) -> list[str]:
        """In words, what is different in another encoding."""
        found = []
        if self.encoder != other.encoder or self.family != other.family:
            found.append("the model (its text encoder, vision tower or VAE, or their settings)")
        names = {f.name: f"--{f.name}" for f in fields(self)} | {
            "teacher": "--teacher-view", "sentence": "--teacher-sentence", "background": "--teacher-background",
            "empty_captions": "--empty-captions", "heldout": "--heldout-caption",
        }  # fmt: skip
        for name in list(names)[2:]:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{names[name].replace('--pre', 'pre')} ({_shown(mine)}, now {_shown(theirs)})")
        return found


def _shown(value: object) -> str:
    return f"{value!r:.60}" if value != "" else "none"
