"""The names of the demo world: each of the form "[A7]", a letter and a digit in one bracket, four tokens.

A BOUND name belongs to an appearance that the demo model has learned, so that a training that changes every badge
damages what the model knows. A subject fixes all four attributes; a style fixes texture and center only. The UNBOUND
names have the same form and letters, but the model has never seen a caption that says what they look like: the trigger
is one of them. A letter and a digit, because Qwen's tokenizer merges most pairs of letters into one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .world import APPEARANCE, HELD_OUT, TRIGGER, Scenes, sample_scenes

FREE = -1
"""The class index of an attribute that a name does not fix."""
NUM_SUBJECTS, NUM_STYLES = 104, 12
_LETTERS, _DIGITS = "ABDEGHKLQRVXZ", "0123456789"


@dataclass(frozen=True, eq=False)
class BoundNames:
    """n names with their appearances.

    Attributes:
        texts: the names [n].
        appearance: class index per attribute of APPEARANCE, or FREE, int64 [n, 4].
    """

    texts: tuple[str, ...]
    appearance: Tensor

    def __len__(self) -> int:
        return len(self.texts)


def _shuffled_names(generator: torch.Generator) -> list[str]:
    names = [f"[{letter}{digit}]" for letter in _LETTERS for digit in _DIGITS]
    names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    names.remove(TRIGGER)
    return [*names, TRIGGER]


def _bind() -> tuple[BoundNames, BoundNames, tuple[str, ...]]:
    generator = torch.Generator().manual_seed(20261126)
    names = _shuffled_names(generator)
    ordinary = (~HELD_OUT).nonzero()
    ordinary = ordinary[ordinary[:, 1] != ordinary[:, 2]]
    subjects = ordinary[torch.randperm(len(ordinary), generator=generator)[:NUM_SUBJECTS]]
    styles = torch.cartesian_prod(torch.arange(8), torch.arange(3))  # center, texture
    styles = styles[torch.randperm(len(styles), generator=generator)[:NUM_STYLES]]
    free = torch.full_like(styles, FREE)
    end = NUM_SUBJECTS + NUM_STYLES
    return (
        BoundNames(tuple(names[:NUM_SUBJECTS]), subjects),
        BoundNames(tuple(names[NUM_SUBJECTS:end]), torch.cat([free, styles], 1)),
        tuple(names[end:]),
    )


SUBJECTS, STYLES, UNBOUND = _bind()


def scenes_with(appearance: Tensor, generator: torch.Generator) -> Scenes:
    """One random scene per row of `appearance`, int64 [n, 4]; FREE attributes are drawn among ordinary appearances.

    Raises:
        ValueError: no ordinary appearance has a row's attributes.
    """
    rows = []
    for wanted in appearance:
        fixed = wanted != FREE
        if bool(fixed.all()):
            rows.append(wanted)
            continue
        found = (~HELD_OUT).nonzero()
        found = found[(found[:, 1] != found[:, 2]) & (found[:, fixed] == wanted[fixed]).all(1)]
        if not len(found):
            raise ValueError(f"no ordinary appearance has the attributes {wanted.tolist()}")
        rows.append(found[int(torch.randint(len(found), (), generator=generator))])
    layout = sample_scenes(len(appearance), generator)
    chosen = dict(zip(APPEARANCE, torch.stack(rows).unbind(1), strict=True))
    return Scenes(**chosen, position=layout.position, background=layout.background, jitter=layout.jitter)
