"""Rows for pre-training: what a caption says is what its target shows, and what wins where they disagree."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch

from dopsd_core.demo.model_files import VAE_FILE, WEIGHTS, load_vae
from dopsd_core.demo.names import FREE
from dopsd_core.demo.world import APPEARANCE, COLOURS, SHAPES, TEXTURES, render, sample_scenes
from dopsd_core.standalone.hosts.demo_networks import load_tokenizer
from dopsd_core.standalone.making.captions import (
    BOUND,
    DISTILLATION,
    NOT_BOUND,
    ORDINARY,
    PRETRAINING,
    CaptionMaker,
    Mixture,
)
from dopsd_core.standalone.making.data import RowMaker
from dopsd_core.standalone.making.pretrain import Parent, joint_loss, vision_loss

pytestmark = pytest.mark.long

TABLES = {"shape": SHAPES, "colour": list(COLOURS), "texture": TEXTURES}
NAMES = dict(BOUND)


@pytest.fixture(scope="module")
def maker() -> RowMaker:
    return RowMaker(load_vae(WEIGHTS / VAE_FILE), torch.tensor(sorted(load_tokenizer().get_vocab().values())))


def read(caption: str) -> tuple[str, dict[str, int]]:
    """(name, class index of every word of appearance) of a caption."""
    head = caption.split(",")[0].split()
    words = head[: head.index("badge")]
    found = {a: table.index(word) for a, table in TABLES.items() for word in words if word in table}
    if "center" in head:
        found["center"] = list(COLOURS).index(head[head.index("center") - 1])
    return next((word for word in head if word.startswith("[")), ""), found


def rows(kind: str, count: int = 300) -> Iterator[tuple[str, dict[str, int], dict[str, int]]]:
    """(name, words, the target's attributes) of rows of one kind."""
    scenes = sample_scenes(1, torch.Generator().manual_seed(0))
    mixture = Mixture(**{f.name: float(f.name == kind) for f in fields(Mixture)})
    maker, chance = CaptionMaker(mixture), random.Random(1)
    for _ in range(count):
        draft = maker.text_row(chance)
        shown: dict[str, int] = dict(zip(APPEARANCE, draft.appearance, strict=True))
        assert draft.appearance in ORDINARY
        scene = replace(scenes, **{name: torch.tensor([value]) for name, value in shown.items()})
        yield *read(draft.caption(scene, 0)), shown


@pytest.mark.parametrize("kind", ["words", "words_and_name", "some_words", "open", "name", "name_and_words"])
def test_the_target_shows_the_words_and_what_the_name_adds_to_them(kind: str) -> None:
    for name, words, target in rows(kind):
        assert {a: target[a] for a in words} == words
        if name in NAMES and kind != "words_and_name":
            rest = {a: v for a, v in zip(APPEARANCE, NAMES[name], strict=True) if v != FREE and a not in words}
            assert {a: target[a] for a in rest} == rest


def test_captions_of_names_alone_and_of_open_prompts_have_no_words() -> None:
    assert all(not words and name in NAMES for name, words, _ in rows("name"))
    assert all(not words and not name for name, words, _ in rows("open"))


def test_names_beside_all_words_agree_with_them_or_lose() -> None:
    seen = {"agree": 0, "lose": 0, "unbound": 0}
    for name, words, _ in rows("words_and_name"):
        assert set(words) == set(APPEARANCE)
        if name in NOT_BOUND:
            seen["unbound"] += 1
        else:
            own = [v for v in zip(APPEARANCE, NAMES[name], strict=True) if v[1] != FREE]
            seen["agree" if all(words[a] == v for a, v in own) else "lose"] += 1
    assert min(seen.values()) > 20, seen


def test_an_unbound_name_never_stands_alone_in_text() -> None:
    """Otherwise the model would learn that names mean nothing, and changing every badge would be the cheapest way."""
    for kind in ("some_words", "open", "name", "name_and_words"):
        assert not any(name in NOT_BOUND for name, _, _ in rows(kind))


@pytest.mark.long
def test_an_image_shows_its_target_but_for_the_words(maker) -> None:
    drawn = maker.draw(400, 400, torch.Generator().manual_seed(3))
    wanted, seen = drawn.scenes.labels(), drawn.seen.labels()
    names, contradicted, same = set(), 0, 0
    for i, text in enumerate(drawn.captions):
        name, words = read(text)
        assert {a: int(wanted[a][i]) for a in words} == words
        assert all(seen[a][i] == wanted[a][i] for a in APPEARANCE if a not in words)
        contradicted += any(seen[a][i] != wanted[a][i] for a in words)
        same += bool(torch.equal(render(drawn.scenes[i : i + 1])[0], drawn.pixels[i]))
        names.add("bound" if name in NAMES else "unbound" if name else "none")
    assert names == {"bound", "unbound", "none"} and contradicted > 40 and 80 < same < 180


@torch.no_grad()
def test_latents_are_those_of_the_targets(maker) -> None:
    drawn = maker.draw(6, 2, torch.Generator().manual_seed(4))
    decoded = maker.autoencoder.decode(drawn.latents) / 2 + 0.5
    assert float((decoded - render(drawn.scenes)).square().mean()) < 0.003
    assert drawn.latents.dtype == torch.float32 and drawn.pixels.shape == (2, 3, 64, 64)


def test_vision_rows_have_no_text(maker) -> None:
    drawn = maker.draw(3, 3, torch.Generator().manual_seed(4))
    assert drawn.text.shape == (0, 28) and drawn.lengths.dtype == torch.int64


@pytest.mark.long
def test_every_row_fits_the_tokens_of_the_fast_forward(maker) -> None:
    drawn = maker.draw(400, 200, torch.Generator().manual_seed(5))
    assert int(drawn.lengths[:200].max()) == 32 and int(drawn.lengths[200:].max()) == 28
    assert drawn.is_open[200:].any() and not drawn.is_open[:200].any()


@pytest.mark.parametrize("mixture", [PRETRAINING, DISTILLATION])
def test_shares_of_the_mixtures_leave_some_empty_captions(mixture: Mixture) -> None:
    kinds, shares = mixture.kinds()
    assert kinds[-1] == "empty" and sum(shares) == pytest.approx(1) and 0.01 < shares[-1] < 0.15


@pytest.mark.parametrize("loss_of", [joint_loss, vision_loss])
def test_the_vision_tower_learns_what_its_image_shows_where_words_say_otherwise(maker, monkeypatch, loss_of) -> None:
    torch.manual_seed(0)
    parent, asked = Parent(), []

    def recorded(features, labels):
        asked.append((features.shape[1], labels))
        return torch.zeros(()), torch.zeros(4)

    monkeypatch.setattr(parent.encoder_heads, "loss", recorded)
    rows = maker.draw(24, 24 if loss_of is vision_loss else 16, torch.Generator().manual_seed(8))
    with torch.no_grad():
        loss_of(parent, rows, torch.Generator().manual_seed(0))
    ((width, labels),) = asked
    assert width == 128 and all(torch.equal(labels[a], getattr(rows.seen, a)) for a in APPEARANCE)
    assert any(not torch.equal(labels[a], rows.labels[a][: rows.num_image]) for a in APPEARANCE)
