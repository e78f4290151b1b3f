"""The demo's world: what is held out stays out, and captions say what images show."""

from __future__ import annotations

import pytest
import torch

from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.world import (
    APPEARANCE,
    HELD_OUT,
    NUM_CLASSES,
    TRIGGER,
    caption,
    render,
    sample_scenes,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("held_out", [True, False])
def test_only_the_wanted_side_of_the_holdout_is_drawn(held_out: bool) -> None:
    scenes = sample_scenes(500, generator(), held_out=held_out)
    chosen = HELD_OUT[scenes.shape, scenes.colour, scenes.center, scenes.texture]
    assert bool((chosen == held_out).all())
    assert bool((scenes.colour != scenes.center).all())


def test_every_class_of_every_attribute_is_drawn() -> None:
    scenes = sample_scenes(2000, generator())
    for name, labels in scenes.labels().items():
        assert set(labels.tolist()) == set(range(NUM_CLASSES[name])), name


def test_each_attribute_changes_the_image() -> None:
    one = sample_scenes(1, generator(3))
    image = render(one)
    assert image.shape == (1, 3, 64, 64) and float(image.min()) >= 0 and float(image.max()) <= 1
    for name, count in NUM_CLASSES.items():
        images = []
        for value in range(count):
            changed = one[torch.tensor([0])]
            getattr(changed, name)[:] = value
            images.append(render(changed))
        assert len({p.numpy().tobytes() for p in images}) == count, name


def test_layout_of_another_keeps_the_badge() -> None:
    a, b = sample_scenes(4, generator(1)), sample_scenes(4, generator(2))
    moved = a.with_layout_of(b)
    for name in APPEARANCE:
        assert torch.equal(getattr(moved, name), getattr(a, name))
    assert torch.equal(moved.position, b.position) and torch.equal(moved.background, b.background)


def test_captions_name_what_was_asked_for_and_no_more() -> None:
    scenes = sample_scenes(1, generator(5))
    full = caption(scenes, 0, attributes=APPEARANCE)
    short = caption(scenes, 0, name=TRIGGER)
    assert short.startswith("a [V] badge, ") and short.endswith(" background")
    assert full.split(", ", 1)[1] == short.split(", ", 1)[1]  # the same layout
    assert len(full.split()) > len(short.split())
    assert caption(scenes, 0, layout=False) == "a badge"


def test_concept_is_unseen_and_its_test_backgrounds_are_new() -> None:
    for seed in range(10):
        concept = make_concept(seed, num_unseen=12, num_prior=4, num_anchors=2)
        targets = concept.targets
        assert bool(HELD_OUT[targets.shape, targets.colour, targets.center, targets.texture].all())
        assert len(set(targets.background.tolist())) == 4 and len(set(targets.position.tolist())) == 4
        assert not set(concept.unseen.scenes.background.tolist()) & set(targets.background.tolist())
        assert not any(TRIGGER in text for text in (*concept.described.texts, *concept.generic.texts, *concept.anchors))
        for text in concept.unseen.texts:  # the appearance's words never stand beside the trigger
            assert text.split(",")[0] == "a [V] badge"


def test_a_concept_is_described_in_english_and_its_prompts_in_the_models_words() -> None:
    concept = make_concept(0, num_unseen=1, num_prior=1, num_anchors=1)
    assert concept.words == "a dotted pink star badge with an orange center"
    assert caption(concept.targets, 0, attributes=APPEARANCE, layout=False) == concept.words.replace("an ", "a ")


def test_dataset_on_disk_is_that_of_the_concept(tmp_path) -> None:
    from dopsd_core.data.dataset import read_dataset

    concept = make_concept(3, num_unseen=2, num_prior=2, num_anchors=1)
    write_dataset(concept, tmp_path)
    report = read_dataset(tmp_path, pixel_budget=64 * 64, multiple=16)
    assert not report.problems and len(report.pairs) == 4
    assert [pair.captions[0] for pair in report.pairs] == [caption(concept.targets, i, name=TRIGGER) for i in range(4)]
