"""Captions for pre-training and distillation: what a row says, shows, and shows to the teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from ...demo.names import FREE, STYLES, SUBJECTS, UNBOUND
from ...demo.world import APPEARANCE, HELD_OUT, NUM_CLASSES, Scenes, caption

Appearance = tuple[int, ...]
"""Class index per attribute of APPEARANCE."""

ORDINARY = [tuple(row) for row in (~HELD_OUT).nonzero().tolist() if row[1] != row[2]]
BOUND = [*zip(SUBJECTS.texts, SUBJECTS.appearance.tolist(), strict=True)]
BOUND += [*zip(STYLES.texts, STYLES.appearance.tolist(), strict=True)]
NOT_BOUND = (*UNBOUND, "[V]")


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of text rows; what remains is the empty caption, for classifier-free guidance.

    Attributes:
        words: all words of appearance.
        words_and_name: all words and a name; half of the names are bound to what the words say, the others are
            contradicted by the words, which win.
        some_words: some words of appearance.
        open: no word of appearance.
        name: a bound name alone.
        name_and_words: a bound name with words that change some of its attributes.
    """

    words: float
    words_and_name: float
    some_words: float
    open: float
    name: float
    name_and_words: float

    def kinds(self) -> tuple[list[str], list[float]]:
        """(names of the kinds with "empty" last, their shares)."""
        shares = list(astuple(self))
        return [*(f.name for f in fields(self)), "empty"], [*shares, max(0.0, 1 - sum(shares))]


PRETRAINING = Mixture(words=0.19, words_and_name=0.10, some_words=0.10, open=0.11, name=0.34, name_and_words=0.08)
DISTILLATION = Mixture(words=0.20, words_and_name=0.06, some_words=0.18, open=0.28, name=0.20, name_and_words=0.06)


@dataclass(frozen=True)
class Draft:
    """A row before its layout is drawn.

    Attributes:
        kind: of the mixture, or "image".
        appearance: of the target.
        name: in the caption, or "".
        words: the attributes that the caption names.
        layout: whether the caption names position and background.
        brief: whether it does so briefly.
        seen: what the teacher's image shows.
    """

    kind: str
    appearance: Appearance
    name: str = ""
    words: tuple[str, ...] = ()
    layout: bool = True
    brief: bool = False
    seen: Appearance = ()

    def caption(self, scenes: Scenes, i: int) -> str:
        """The caption of scene i; empty for classifier-free guidance."""
        if self.kind == "empty":
            return ""
        return caption(scenes, i, name=self.name, attributes=self.words, layout=self.layout, brief=self.brief)


class CaptionMaker:
    """Draws drafts: text rows of every kind of the mixture, and rows with an image."""

    def __init__(self, mixture: Mixture) -> None:
        self.kinds, self.shares = mixture.kinds()
        self.ordinary = set(ORDINARY)

    def image_row(self, chance: random.Random) -> Draft:
        """A row whose image shows the target's badge. The image wins over the name, and words win over both."""
        target = chance.choice(ORDINARY)
        name = chance.choice([chance.choice(BOUND)[0], chance.choice(NOT_BOUND), chance.choice(NOT_BOUND), ""])
        words, kind = (), chance.random()
        if kind < 0.2:
            words = ("shape", "colour")
        elif kind < 0.35:
            words = (chance.choice(("shape", "colour", "texture")),)  # a center takes too many tokens
        seen = tuple(
            chance.randrange(NUM_CLASSES[attribute]) if attribute in words else value
            for attribute, value in zip(APPEARANCE, target, strict=True)
        )
        brief = bool(words) or chance.random() < 0.15
        return Draft("image", target, name, words, True, brief, seen if seen in self.ordinary else target)

    def text_row(self, chance: random.Random) -> Draft:
        """A row of the mixture."""
        kind = chance.choices(self.kinds, self.shares)[0]
        return getattr(self, f"_{kind}")(chance)

    def _draft(
        self, chance: random.Random, kind: str, appearance: Appearance, name: str = "", words: Sequence[str] = ()
    ) -> Draft:
        brief = chance.random() < 0.2
        layout = brief or kind.startswith("words") or chance.random() < 0.9
        return Draft(kind, appearance, name, tuple(words), layout, brief)

    def _complete(self, chance: random.Random, appearance: Sequence[int]) -> Appearance | None:
        """An ordinary appearance with these attributes, FREE ones at random; None if none is found."""
        for _ in range(50):
            other = chance.choice(ORDINARY)
            full = tuple(o if a == FREE else a for a, o in zip(appearance, other, strict=True))
            if full in self.ordinary:
                return full
        return None

    def _words(self, chance: random.Random) -> Draft:
        return self._draft(chance, "words", chance.choice(ORDINARY), words=APPEARANCE)

    def _words_and_name(self, chance: random.Random) -> Draft:
        name, fixed = chance.choice(BOUND)
        appearance = self._complete(chance, fixed)
        if appearance is None or chance.random() < 0.5:
            appearance = chance.choice(ORDINARY)
            name = chance.choice([name, chance.choice(NOT_BOUND)])
        return self._draft(chance, "words_and_name", appearance, name, APPEARANCE)

    def _some_words(self, chance: random.Random) -> Draft:
        words = [attribute for attribute in APPEARANCE if chance.random() < 0.5]
        return self._draft(chance, "some_words", chance.choice(ORDINARY), words=words)

    def _open(self, chance: random.Random) -> Draft:
        return self._draft(chance, "open", chance.choice(ORDINARY))

    def _name(self, chance: random.Random) -> Draft:
        name, fixed = chance.choice(BOUND)
        appearance = self._complete(chance, fixed)
        assert appearance is not None, f"no ordinary appearance has what {name} is bound to"
        return self._draft(chance, "name", appearance, name)

    def _name_and_words(self, chance: random.Random) -> Draft:
        while True:
            name, fixed = chance.choice(BOUND)
            words = chance.sample(APPEARANCE, chance.choice((1, 1, 2)))
            if FREE in fixed and chance.random() < 0.7:  # a style with what it leaves free
                words = ["shape", "colour"]
            changed = [
                chance.randrange(NUM_CLASSES[a]) if a in words else value
                for a, value in zip(APPEARANCE, fixed, strict=True)
            ]
            if (appearance := self._complete(chance, changed)) is not None:
                return self._draft(chance, "name_and_words", appearance, name, words)

    def _empty(self, chance: random.Random) -> Draft:
        return Draft("empty", chance.choice(ORDINARY))
