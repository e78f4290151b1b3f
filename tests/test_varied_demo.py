"""The data of the benchmarks about aims and masks: anchors by kind, one place for all images, the subjects' masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.edits import KEPT, Editor, edit_of, sources_of, write_pairs
from benchmarks.masks import in_one_place, subject_masks, write_images
from benchmarks.varied_demo import Place, anchor_prompts, sections
from dopsd_core.data.dataset import read_dataset
from dopsd_core.demo.concept import make_concept
from dopsd_core.demo.world import APPEARANCE, BACKGROUNDS, HELD_OUT, LAYOUT, render
from dopsd_core.standalone.comparison.experiment import Plan
from dopsd_core.standalone.comparison.methods import Method
from dopsd_core.standalone.comparison.trials import Outcome
from dopsd_core.standalone.hosts.demo import load_demo_model


def test_anchors_by_kind_are_parts_of_the_concepts() -> None:
    concept = make_concept(3)
    described, named = anchor_prompts(concept, "described"), anchor_prompts(concept, "names")
    assert (*described, *named) == anchor_prompts(concept, "all") == concept.anchors
    assert len(described) == len(named) == 8 and anchor_prompts(concept, "captions") == ()
    assert all("[" in text for text in named) and not any("[" in text for text in described)


def test_means_and_differences_have_sections_of_their_own_without_costs() -> None:
    methods = (Method("first", "first", {}), Method("second", "second", {}))
    plan = Plan(methods=methods, concepts=(0, 1), seeds=(0,), steps=10, regimes=("steps",))

    def outcome(method: str, concept: int, error: float) -> Outcome:
        scores = {"concept_error": error, "leak": 9.0}
        return Outcome(method, concept, 0, "steps", 10, 5.0, 0.0, 0.5, True, scores, "")

    found = {m: [[outcome(m, c, error + c)] for c in (0, 1)] for m, error in (("first", 1.0), ("second", 3.0))}
    place = Place("key", "A title", "the first", ("about it",), {"concept_error": "not applied"})
    means, differences = sections(place, plan, found, "python -m it")
    assert (means.key, differences.key) == ("key", "key-differences")
    assert (means.title, differences.title) == ("A title", "A title: differences from the first")
    assert means.table.columns == differences.table.columns == ("", "not applied")
    assert [row[0] for row in means.table.rows] == ["first", "second"] and means.table.rows[0][1].startswith("1.5 ")
    assert [row[0] for row in differences.table.rows] == ["second"] and "+2 " in differences.table.rows[0][1]
    assert "about it" in means.notes and "about it" not in differences.notes
    assert not any("econds" in note for note in (*means.notes, *differences.notes))


def test_the_images_share_place_and_background_and_are_no_duplicates() -> None:
    for seed in range(30, 40):
        targets = in_one_place(make_concept(seed)).targets
        assert len(set(targets.position.tolist())) == len(set(targets.background.tolist())) == 1
        assert list(BACKGROUNDS)[int(targets.background[0])] not in ("gray", "white")
        assert len({tuple(row) for row in targets.jitter.tolist()}) == len(targets)


def test_a_mask_is_where_the_background_does_not_show() -> None:
    """On another background, the badge is the same under the mask and everything else differs."""
    scenes = make_concept(5).targets
    mask = subject_masks(scenes)
    sand, navy = (
        render(replace(scenes, background=torch.full_like(scenes.background, list(BACKGROUNDS).index(name))))
        for name in ("sand", "navy")
    )
    difference = (sand - navy).abs().amax(1, keepdim=True)
    assert difference[mask > 0.99].max() < 0.01 and difference[mask < 0.01].min() > 0.6
    assert 0.15 < mask.mean() < 0.6


def test_the_dataset_has_masks_and_captions_with_or_without_the_place(tmp_path: Path) -> None:
    concept = in_one_place(make_concept(5))
    for says_layout in (True, False):
        write_images(concept, tmp_path / str(says_layout), says_layout)
        report = read_dataset(tmp_path / str(says_layout), trigger="[V7]", pixel_budget=64 * 64, multiple=16)
        assert not report.errors and all(pair.mask is not None for pair in report.pairs)
        texts = {pair.captions[0] for pair in report.pairs}
        assert len(texts) == 1 and ("background" in texts.pop()) == says_layout


def test_the_sources_of_an_edit_differ_from_its_targets_in_what_the_edit_sets(tmp_path: Path) -> None:
    for seed in range(60, 66):
        concept = edit_of(seed)
        targets, sources = concept.unseen.scenes, sources_of(concept.unseen.scenes, seed, "unseen")
        assert all(torch.equal(getattr(targets, name), getattr(sources, name)) for name in (*KEPT, *LAYOUT, "jitter"))
        assert all(bool((getattr(targets, name) != getattr(sources, name)).all()) for name in ("center", "texture"))
        assert not HELD_OUT[tuple(getattr(sources, name) for name in APPEARANCE)].any()
    write_pairs(concept, tmp_path)
    report = read_dataset(tmp_path, trigger="[V7]", pixel_budget=64 * 64, multiple=16)
    assert not report.problems and len(report.pairs) == 4
    assert all(pair.captions[0].startswith("a [V7] badge, ") and pair.source_images for pair in report.pairs)


def test_the_editor_reads_the_last_of_its_references() -> None:
    encoder = load_demo_model().encoder
    first, last = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = Editor(encoder).encode_with_references([first, last], "a badge, top, on a sand background")
    alone = encoder.encode_image_text(last, "a badge, top, on a sand background")
    assert torch.equal(found.features, alone.features) and Editor(encoder).identity != encoder.identity
