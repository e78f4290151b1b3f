"""The domain of the full-weights benchmark: what its images have in common, its captions do not say, its scores see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")  # the judge's package

from benchmarks.full_weights import METHODS, REFERENCES, Scores, Size, Trial, to_section
from benchmarks.full_weights_domain import anchor_prompts, make_domain, score, write_domain
from dopsd_core.adapters import Full
from dopsd_core.data.dataset import read_dataset
from dopsd_core.demo.names import STYLES
from dopsd_core.demo.settings import SAMPLE_STEPS
from dopsd_core.demo.world import COLOURS, TEXTURES, render

SIZE = Size(steps=5, images=24, prompts=40)


@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_one_style_lies_over_everything(seed: int) -> None:
    domain = make_domain(seed, SIZE.images, SIZE.prompts)
    style = {(int(c), int(t)) for s in (domain.train, domain.test) for c, t in zip(s.center, s.texture, strict=True)}
    ((center, texture),) = style
    assert [center, texture] not in STYLES.appearance[:, 2:].tolist()
    assert len(set(domain.train.shape.tolist())) > 3 and len(set(domain.train.colour.tolist())) > 3
    assert len(domain.train) == 24 and len(domain.test) == len(domain.described) == len(domain.named) == 40
    assert not (domain.described.center == center).any() and not (domain.described.texture == texture).any()
    for text in (*domain.texts("train"), *domain.texts("test")):
        assert TEXTURES[texture] not in text and "center" not in text and "[" not in text
        assert any(colour in text for colour in COLOURS)
    assert all("center" in text for text in domain.texts("described"))
    assert all(name in text for name, text in zip(domain.names, domain.texts("named"), strict=True))
    scored = {*domain.texts("test"), *domain.texts("described"), *domain.texts("named")}
    assert len(set(anchor_prompts(seed)) - scored) > 20


def test_it_is_written_as_a_dataset(tmp_path: Path) -> None:
    domain = make_domain(3, 5, 4)
    write_domain(domain, tmp_path)
    report = read_dataset(tmp_path, pixel_budget=64 * 64, multiple=16)
    assert not report.errors and [pair.captions[0] for pair in report.pairs] == list(domain.texts("train"))


def test_renders_have_the_best_scores_and_other_images_do_not() -> None:
    torch.set_num_threads(1)
    domain = make_domain(0, SIZE.images, SIZE.prompts)
    real = {kind: render(getattr(domain, kind)) for kind in ("test", "described", "named")}
    best = score(domain, real)
    assert best.style > 0.95 and best.following > 0.95 and best.prior_error < 0.05 and best.sharpness == 1
    assert best.frechet_domain < 1e-3 and best.frechet_prior < 1e-3 and best.names_wrong < 0.05
    plain = score(domain, {**real, "test": real["described"]})
    assert plain.style < 0.3 and plain.following < 0.7 and plain.frechet_domain > 100


def test_all_methods_train_all_weights_at_equal_steps() -> None:
    configs = {method.name: Trial(method.name, 3e-4, 0, 1, SIZE).config() for method in METHODS}
    assert all(config.adapter == Full() for config in configs.values())
    facts = {(c.optimizer.lr, c.steps, c.batch_size, c.seed, c.schedule.warmup) for c in configs.values()}
    assert len(facts) == 1 and facts.pop()[:2] == (3e-4, 5)
    assert [config.objective.name for config in configs.values()] == ["dopsd", "dopsd", "sft", "pso"]
    assert [config.objective.anchor_share for config in configs.values()] == [0.0, 0.5, 0.0, 0.0]


def test_the_section_has_a_row_per_method() -> None:
    rates = {method.name: 1e-4 for method in METHODS}
    found = {
        Trial(name, rates.get(name, 0.0), domain, 0, SIZE): Scores(10.0 * domain, 0.5, 1.0, 0.9, 0.1, 20.0, 0.0)
        for name in (*REFERENCES, *rates)
        for domain in (1, 3)
    }
    section = to_section(found, rates, (1e-4, 1e-3), "python -m x", SIZE)
    rows = {row[0]: row[1:] for row in section.table.rows}
    assert rows["SFT, lr 0.0001"] == ("20 ± 10", "0.5 ± 0", "1 ± 0", "0.9 ± 0", "0.1 ± 0", "20 ± 0", "0 ± 0")
    assert rows["other real renders"] == ("20 ± 10", "", "", "0.9 ± 0", "", "20 ± 0", "")
    assert "2 domains with 1 seeds each" in section.notes[0] and f"{SAMPLE_STEPS} sampling steps" in section.notes[0]
