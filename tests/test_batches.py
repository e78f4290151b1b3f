"""The batches of a step: a function of (seed, step, micro), and together those of one larger batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dopsd_core.objectives import ObjectiveInputs
from dopsd_core.training.batches import Batches
from dopsd_core.training.rng import DataOrder
from tests.tiny import TinyDenoiser, make_config, make_data

STEPS = 4
DATA = make_data(8, shapes=((2, 3),))


def batches(batch_size: int, accumulation: int, seed: int = 3) -> Batches:
    config = make_config(batch_size=batch_size, grad_accumulation=accumulation, seed=seed)
    weights: Any = None
    order = DataOrder(DATA.shapes(), DATA.repeats(), batch_size, seed)
    return Batches(config, TinyDenoiser(), weights, DATA, order, ())


def of_step(made: Batches, step: int) -> tuple[list[str], torch.Tensor]:
    """(captions, noise [samples, C, h, w]) of all batches of a step."""
    every = [made.inputs(step, micro, (), 1.0) for micro in range(made.config.grad_accumulation)]
    return captions(every), torch.cat([inputs.noise for inputs in every])


def captions(every: list[ObjectiveInputs]) -> list[str]:
    return [pair.caption for inputs in every for pair in inputs.pairs]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4)])
def test_accumulated_batches_are_one_larger_batch(batch_size: int, accumulation: int) -> None:
    for step in range(STEPS):
        ours, theirs = (of_step(made, step) for made in (batches(batch_size, accumulation), batches(4, 1)))
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
        assert len({noise.numpy().tobytes() for noise in ours[1]}) == 4


def test_an_epoch_of_accumulated_batches_visits_every_image() -> None:
    made = batches(2, 4)
    for step in range(STEPS):
        assert sorted(of_step(made, step)[0]) == sorted(pair.caption for pair in DATA.pairs)


def test_steps_and_seeds_have_images_and_noise_of_their_own() -> None:
    """And the same again, asked in any order: so a resumed run has those of an uninterrupted one."""
    found = {(seed, step): of_step(batches(2, 2, seed), step) for seed in (3, 4) for step in range(STEPS)}
    assert len({noise.numpy().tobytes() for _, noise in found.values()}) == len(found)
    assert len({tuple(words) for words, _ in found.values()}) > len(found) // 2
    made = batches(2, 2)
    for step in reversed(range(STEPS)):
        words, noise = of_step(made, step)
        assert words == found[3, step][0] and torch.equal(noise, found[3, step][1])


def test_each_micro_batch_has_a_generator_of_its_own_and_its_share_of_the_loss() -> None:
    made = batches(1, 4)
    every = [made.inputs(step, micro, (), 8.0) for step in range(2) for micro in range(4)]
    assert len({inputs.generator.initial_seed() for inputs in every}) == 8
    assert {inputs.loss_scale for inputs in every} == {2.0}
