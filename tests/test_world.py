"""The demo's world: what is held out stays out, and captions say what images show."""

from __future__ import annotations

import pytest
import torch

from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.names import STYLES, SUBJECTS
from dopsd_core.demo.world import (
    APPEARANCE,
    COLOURS,
    HELD_OUT,
    NUM_CLASSES,
    SHAPES,
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
    assert short.startswith(f"a {TRIGGER} badge, ") and short.endswith(" background")
    brief = caption(scenes, 0, name=TRIGGER, brief=True)
    assert brief.split(", ")[:2] == short.split(", ")[:2] and short.startswith(brief.replace(", on ", ", on a "))
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
        for text in concept.unseen.texts:  # no word of the appearance stands beside the trigger
            assert text.split(",")[0] == f"a {TRIGGER} badge"


def test_a_style_fixes_center_and_texture_and_its_captions_say_the_rest() -> None:
    seen = set()
    for seed in range(8):
        concept = make_concept(seed, style=True, num_unseen=20, num_prior=4, num_anchors=2)
        for scenes in (concept.targets, concept.unseen.scenes):
            fixed = torch.stack([getattr(scenes, name) for name in concept.decided], 1)
            assert concept.decided == ("center", "texture") and len(fixed.unique(dim=0)) == 1
            assert bool((scenes.colour != scenes.center).all())
        seen.add(tuple(fixed[0].tolist()))
        assert tuple(fixed[0].tolist()) not in {tuple(row[2:]) for row in STYLES.appearance.tolist()}
        assert len(set(concept.targets.shape.tolist())) == len(set(concept.targets.colour.tolist())) == 4
        assert len(set(concept.unseen.scenes.shape.tolist())) > 2
        for i, text in enumerate(concept.unseen.texts):
            colour = list(COLOURS)[int(concept.unseen.scenes.colour[i])]
            shape = SHAPES[int(concept.unseen.scenes.shape[i])]
            assert text.startswith(f"a {TRIGGER} {colour} {shape} badge, ") and "center" not in text
        assert concept.words.startswith("a ") and concept.words.endswith("center") and len(concept.words.split()) == 7
    assert len(seen) > 3


def test_bound_names_are_evaluated_and_anchored_with_other_prompts() -> None:
    concept = make_concept(1, num_unseen=4, num_prior=80, num_anchors=16)
    bound = dict(zip(SUBJECTS.texts, SUBJECTS.appearance.tolist(), strict=True))
    names = [text.split()[1] for text in concept.named.texts]
    assert len(set(names)) == 80
    for i, name in enumerate(names):
        assert [int(getattr(concept.named.scenes, a)[i]) for a in APPEARANCE] == bound[name]
    anchored = [text for text in concept.anchors if "[" in text]
    assert len(concept.anchors) == 16 and len(anchored) == 8 and not set(anchored) & set(concept.named.texts)


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
    assert [pair.captions[0] for pair in report.pairs] == [caption(concept.targets, i, name="[V]") for i in range(4)]
    report = read_dataset(tmp_path, pixel_budget=64 * 64, multiple=16, trigger=TRIGGER)
    assert [pair.captions[0] for pair in report.pairs] == [caption(concept.targets, i, name=TRIGGER) for i in range(4)]
