"""Drawing gradient steps by their gap: each as often as asked, and without changing the expected gradient."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.objectives import DOPSD, ObjectiveInputs, ObjectiveOutput
from dopsd_core.objectives.base import StepStats
from dopsd_core.objectives.step_draws import draw_by_gap, inclusion
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.step_losses import StepLosses
from dopsd_core.training.trainer import train
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes

from .toy_denoiser import ToyDenoiser, assert_near, lora, make_inputs, randomise

LOSSES = (4.0, 0.25, 1.0, 0.01)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_probabilities_by_hand() -> None:
    """Half of them even; those at 1 leave the rest to the others."""
    assert inclusion(1, [3.0, 1.0]) == pytest.approx([0.625, 0.375])
    assert inclusion(2, [1.0, 1.0, 1.0, 1.0]) == pytest.approx([0.5] * 4)
    assert inclusion(2, [1.0, 0.0, 0.0]) == pytest.approx([1.0, 0.5, 0.5])
    assert inclusion(1, [0.0, 0.0]) == [0.5, 0.5]
    assert inclusion(3, [5.0, 1.0, 1.0]) == [1.0] * 3


@given(
    sizes=st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
    count=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_as_many_different_steps_as_asked(sizes: list[float], count: int, seed: int) -> None:
    count = min(count, len(sizes))
    chances = inclusion(count, [size**0.5 for size in sizes])
    assert sum(chances) == pytest.approx(count) and all(0 < chance <= 1 for chance in chances)
    drawn = draw_by_gap(count, sizes, generator(seed))
    assert len(drawn) == count and set(drawn) <= set(range(len(sizes)))
    assert all(weight == pytest.approx(1 / (len(sizes) * chances[step])) for step, weight in drawn.items())
    assert all(weight <= 2 / count * (1 + 1e-9) for weight in drawn.values()), "no weight is large"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_step_is_drawn_as_often_as_its_probability(count: int) -> None:
    drawing, total = generator(), torch.zeros(4)
    for _ in range(3000):
        total[list(draw_by_gap(count, LOSSES, drawing))] += 1
    expected = torch.tensor(inclusion(count, [loss**0.5 for loss in LOSSES]))
    assert (total / 3000 - expected).abs().max() < 0.03
    assert expected[0] > expected[2] > expected[1] > expected[3] or count == 3


def test_the_expected_gradient_and_loss_are_those_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over an even grid of the uniform number that the draw takes is exact up to the grid."""
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora(), seed=3)
    randomise(adapters)

    def gradient(objective: DOPSD) -> torch.Tensor:
        for parameter in adapters.parameters():
            parameter.grad = None
        with adapters.attached():
            output = objective.backward(make_inputs(denoiser, adapters, step_losses=LOSSES))
        gradients = [p.grad.flatten() for p in adapters.parameters() if p.grad is not None]
        return torch.cat([*gradients, torch.tensor([output.loss])])

    full = gradient(DOPSD(anchor_probability=0))
    some = DOPSD(anchor_probability=0, grad_steps=2, step_draw="gap")
    chances = inclusion(2, [loss**0.5 for loss in LOSSES])
    edges = torch.tensor(chances).double().cumsum(0)
    cuts = torch.cat([torch.tensor([0.0, 1.0]).double(), edges % 1]).sort().values  # the draw changes only at these
    total = torch.zeros_like(full)
    for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        if high - low > 1e-6:
            place = (low + high) / 2
            monkeypatch.setattr(
                "dopsd_core.objectives.step_draws.torch.rand", lambda *_, place=place, **__: torch.tensor(place)
            )
            drawn = draw_by_gap(2, LOSSES, generator())
            monkeypatch.setattr(DOPSD, "_draw_steps", lambda *_, drawn=drawn: drawn)
            total += (high - low) * gradient(some)
    assert_near(total, full, 1e-5)


def test_the_metrics_of_drawn_steps_are_weighted_means() -> None:
    """A norm ratio of 1 at every step stays 1, whatever the sum of the weights is."""
    stats = [(0, 0.9, torch.tensor([4.0, 2.0, 0.5, 1.0, 1.0, 1.0])), (2, 0.3, torch.tensor([1.0, 5.0, 0.8, 1.0, 1, 1]))]
    drawn = ObjectiveOutput.of(stats, "the target", weights={0: 0.25, 2: 0.5})
    assert drawn.loss == 0.25 * 4 + 0.5 * 1
    assert drawn.metrics == pytest.approx({"gap": 4.0, "cosine": 0.7, "norm_ratio": 1.0})
    plain = ObjectiveOutput.of(stats, "the target")
    assert plain.loss == 2.5 and plain.metrics == pytest.approx({"gap": 3.5, "cosine": 0.65, "norm_ratio": 1.0})


def outputs(*losses: tuple[int, float], is_anchor: bool = False) -> ObjectiveOutput:
    steps = tuple(StepStats(index, 0.5, loss, 1.0, 1.0, 1.0, 1.0, 1.0) for index, loss in losses)
    return ObjectiveOutput(1.0, {}, steps, is_anchor=is_anchor)


def test_the_mean_of_each_step_is_known_when_all_are_measured() -> None:
    losses = StepLosses(2)
    losses.add([outputs((0, 4.0)), outputs((1, 9.0), is_anchor=True)])
    assert losses.known == ()
    losses.add([outputs((1, 1.0)), outputs((0, 2.0))])
    assert losses.known == pytest.approx((3.8, 1.0))
    again = StepLosses(2)
    again.load(losses.state())
    assert again.known == losses.known
    again.load(None)
    assert again.known == losses.known


def test_until_then_and_without_losses_the_draw_is_uniform() -> None:
    denoiser = ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), lora())
    by_gap, evenly = (DOPSD(grad_steps=2, step_draw=draw) for draw in ("gap", "uniform"))
    for seed in range(5):
        inputs = [make_inputs(denoiser, adapters, seed=seed) for _ in range(2)]
        assert by_gap._draw_steps(inputs[0]) == evenly._draw_steps(inputs[1])


def test_a_resumed_run_draws_the_same_steps(tmp_path: Path) -> None:
    """The means are in the checkpoint; without them the resumed run would draw evenly."""
    few = {"rollout_steps": 2, "grad_steps": 1, "grad_accumulation": 3, "anchor_probability": 0.0}
    config = make_config(steps=8, step_draw="gap", checkpoint_every=4, **few)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    train(config.replace(steps=4), TinyDenoiser(), make_data(), tmp_path / "parts")
    state = load_checkpoint(tmp_path / "parts" / "checkpoints")
    assert state is not None and len(state.facts["step_losses"]) == config.rollout_steps
    assert None not in state.facts["step_losses"], "all are known, so that steps are drawn by them"
    train(config, TinyDenoiser(), make_data(), tmp_path / "parts")
    assert saved_bytes(tmp_path / "parts") == saved_bytes(tmp_path / "whole")


def test_a_run_draws_by_the_losses_that_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly until both steps are known; then by the losses up to the step before."""
    seen: list[tuple[float, ...]] = []
    drawing = DOPSD._draw_steps

    def noted(self: DOPSD, inputs: ObjectiveInputs) -> Mapping[int, float]:
        seen.append(tuple(inputs.step_losses))
        return drawing(self, inputs)

    monkeypatch.setattr(DOPSD, "_draw_steps", noted)
    few = {"rollout_steps": 2, "grad_steps": 1, "grad_accumulation": 2, "anchor_probability": 0.0}
    train(make_config(steps=6, step_draw="gap", probe_every=0, **few), TinyDenoiser(), make_data(), tmp_path / "run")
    assert len(seen) == 12 and seen[0] == () and len(seen[-1]) == 2 and min(seen[-1]) > 0
    assert seen[::2] == seen[1::2], "the batches of a step know the same"
    assert len({losses for losses in seen if losses}) > 1, "another step changes them"


def test_without_fewer_steps_there_is_nothing_to_draw() -> None:
    (remark,) = DOPSD(step_draw="gap").remarks()
    assert remark == "step_draw gap is not used: grad_steps is not set, so all steps are trained"
    assert not DOPSD(step_draw="gap", grad_steps=1).remarks()


def test_losses_that_are_equal_give_even_weights() -> None:
    for count, seed in product((1, 2, 4), range(5)):
        weights = list(draw_by_gap(count, [2.0] * 4, generator(seed)).values())
        assert weights == pytest.approx([1 / count] * count)
