"""The names of the demo world: what is bound, what is not, and that the trigger is of the same form."""

from __future__ import annotations

import pytest
import torch

from dopsd_core.demo.names import FREE, STYLES, SUBJECTS, UNBOUND, scenes_with
from dopsd_core.demo.world import APPEARANCE, HELD_OUT, TEXTURES, TRIGGER
from dopsd_core.standalone.hosts.demo_networks import load_tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_at_least_a_hundred_subjects_have_appearances_of_their_own() -> None:
    assert len(SUBJECTS) >= 100 and len(set(SUBJECTS.texts)) == len(SUBJECTS)
    assert len({tuple(row) for row in SUBJECTS.appearance.tolist()}) == len(SUBJECTS)
    shape, colour, center, texture = SUBJECTS.appearance.unbind(1)
    assert not bool(HELD_OUT[shape, colour, center, texture].any())  # a concept is held out: no name is bound to one
    assert not bool((colour == center).any())


def test_styles_fix_texture_and_center_only() -> None:
    assert bool((STYLES.appearance[:, :2] == FREE).all()) and bool((STYLES.appearance[:, 2:] != FREE).all())
    assert len({tuple(row) for row in STYLES.appearance.tolist()}) == len(STYLES) < 8 * len(TEXTURES)


def test_the_trigger_is_unbound_and_its_letter_and_digit_are_in_bound_names() -> None:
    bound = {*SUBJECTS.texts, *STYLES.texts}
    assert TRIGGER in UNBOUND and not bound & set(UNBOUND)
    assert len(bound) == len(SUBJECTS) + len(STYLES)
    _, letter, digit, _ = TRIGGER
    assert any(name[1] == letter for name in bound) and any(name[2] == digit for name in bound)


def test_every_name_is_four_tokens() -> None:
    tokenizer = load_tokenizer()
    without = len(tokenizer.encode("a badge").ids)
    for name in (*SUBJECTS.texts, *STYLES.texts, *UNBOUND):
        assert len(tokenizer.encode(f"a {name} badge").ids) == without + 4, name


def test_scenes_have_the_wanted_attributes_and_free_ones_vary() -> None:
    style = STYLES.appearance[:1].expand(60, 4)
    scenes = scenes_with(torch.cat([SUBJECTS.appearance, style]), generator())
    made = torch.stack([getattr(scenes, name) for name in APPEARANCE], 1)
    assert torch.equal(made[: len(SUBJECTS)], SUBJECTS.appearance)
    styled = made[len(SUBJECTS) :]
    assert torch.equal(styled[:, 2:], style[:, 2:]) and len(set(styled[:, 0].tolist())) > 3
    assert not bool(HELD_OUT[tuple(styled.unbind(1))].any()) and not bool((styled[:, 1] == styled[:, 2]).any())


def test_an_appearance_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no ordinary appearance"):
        scenes_with(torch.tensor([[FREE, 3, 3, FREE]]), generator())  # a center of the body's colour
