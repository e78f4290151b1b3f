"""The demo's figures: closed forms, and that they punish what they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dopsd_core.demo.concept import make_concept
from dopsd_core.demo.model_files import JUDGE_FILE, WEIGHTS
from dopsd_core.demo.world import NUM_CLASSES, render, sample_scenes
from dopsd_core.standalone.compare import best_rate
from dopsd_core.standalone.evaluate import Samples, Scores, frechet_floor, gap_closed, score, summarise
from dopsd_core.standalone.judge import frechet_distance, judge_features, judged_right, laplacian_energy, load_judge


@pytest.fixture(scope="module")
def judge():
    return load_judge(WEIGHTS / JUDGE_FILE)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=g, dtype=torch.float64)
    b = torch.randn(200_000, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]) + 1
    # per axis (mean difference)^2 + (std difference)^2: 3 + 0 + 1 + 4
    assert frechet_distance(a, b) == pytest.approx(8.0, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_frechet_distance_agrees_with_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    g = torch.Generator().manual_seed(1)
    a = torch.randn(500, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 8, generator=g, dtype=torch.float64)
    b = torch.randn(500, 8, generator=g, dtype=torch.float64)
    root = np.trace(np.real(np.asarray(sqrtm((torch.cov(a.T) @ torch.cov(b.T)).numpy()))))
    mean = (a.mean(0) - b.mean(0)).square().sum()
    assert frechet_distance(a, b) == pytest.approx(
        float(mean + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root)
    )


def test_judge_reads_unseen_renders(judge) -> None:
    for held_out in (True, False):
        scenes = sample_scenes(128, torch.Generator().manual_seed(77), held_out=held_out)
        right = judged_right(judge, render(scenes), scenes.labels())
        assert set(right) == set(NUM_CLASSES)
        for name, value in right.items():
            assert float(value.float().mean()) > 0.98, name


def test_blur_is_punished_not_rewarded(judge) -> None:
    scenes = sample_scenes(192, torch.Generator().manual_seed(5))
    real, others = render(scenes), render(sample_scenes(192, torch.Generator().manual_seed(6)))
    blurred = F.avg_pool2d(F.pad(real, (2, 2, 2, 2), mode="replicate"), 5, 1)
    features = judge_features(judge, real)
    floor = frechet_distance(judge_features(judge, others), features)
    assert frechet_distance(judge_features(judge, blurred), features) > 3 * floor
    assert float(laplacian_energy(blurred).mean()) < 0.5 * float(laplacian_energy(real).mean())


def test_perfect_images_score_perfectly(judge) -> None:
    concept = make_concept(2, num_unseen=40, num_prior=96, num_anchors=1)
    kinds = (concept.unseen, concept.described, concept.generic, concept.named)
    perfect = Samples(*(render(prompts.scenes) for prompts in kinds))
    got = score(perfect, concept, judge)
    assert got.concept_error < 0.02 and got.prompt_following > 0.98 and got.sharpness == pytest.approx(1)
    assert got.frechet_trigger < 1e-3 and got.frechet_prior < 1e-3 and got.prior_error < 0.02
    assert got.names_wrong < 0.02
    assert 0.05 < got.leak < 0.35  # chance
    leaking = replace(perfect, generic=render(concept.unseen.scenes)[torch.arange(96) % 40])
    assert score(leaking, concept, judge).leak > 0.98
    assert score(leaking, concept, judge).frechet_prior > 2 * frechet_floor(judge, 192)
    forgotten = replace(perfect, named=render(concept.unseen.scenes)[torch.arange(96) % 40])
    assert score(forgotten, concept, judge).names_wrong > 0.5


def test_a_style_is_judged_by_what_it_decides(judge) -> None:
    concept = make_concept(3, style=True, num_unseen=40, num_prior=60, num_anchors=1)
    kinds = (concept.unseen, concept.described, concept.generic, concept.named)
    perfect = Samples(*(render(prompts.scenes) for prompts in kinds))
    scenes = concept.unseen.scenes
    other = replace(perfect, trigger=render(replace(scenes, shape=(scenes.shape + 1) % 6)))
    got = score(other, concept, judge)
    assert got.concept_error < 0.02 and got.prompt_following < 0.85  # the words for the shape were not followed


def scores(error: float, prior: float) -> Scores:
    return Scores(error, 1.0, 1.0, 0.0, prior, 0.0, 0.0, 0.2)


def test_gap_closed_is_relative_to_the_teacher() -> None:
    methods = {
        "base": summarise([scores(0.8, 1), scores(0.9, 1)]), "teacher": summarise([scores(0.05, 1)]),
        "dopsd": summarise([scores(0.25, 1)]), "sft": summarise([scores(0.85, 1)]),
    }  # fmt: skip
    assert methods["base"]["concept_error"] == pytest.approx({"mean": 0.85, "std": 0.05})
    assert methods["dopsd"]["concept_error"] == {"mean": 0.25}, "one run has no deviation"
    assert gap_closed(methods) == pytest.approx(0.75)
    assert gap_closed(methods, "sft") == pytest.approx(0)


def test_sft_gets_its_best_rate() -> None:
    tried = {1e-4: scores(0.6, 10), 1e-3: scores(0.12, 40), 3e-3: scores(0.05, 90)}
    assert best_rate(tried, scores(0.1, 0)) == 1e-3  # as good a concept, the better prior
    assert best_rate(tried, scores(0.0, 0)) == 3e-3
    assert (
        best_rate({1e-4: scores(0.6, 10), 1e-3: scores(0.5, 40)}, scores(0.1, 0)) == 1e-3
    )  # none is: the best concept
