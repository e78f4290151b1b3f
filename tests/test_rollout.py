"""The rollout against closed forms, and what it promises about graphs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.rollout import euler_step, rollout, sample

from .devices import DEVICE
from .toy_denoiser import SIGMAS, ToyDenoiser, make_pairs

GRIDS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8, unique=True).map(
    lambda values: (*sorted(values, reverse=True), 0.0)
)


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.floats(-2, 2))
def test_linear_velocity_gives_the_product_of_euler_factors(sigmas, rate):
    """v = rate * x, so each step multiplies by 1 + (s' - s) * rate."""
    noise = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    steps = list(rollout(lambda x, sigma: x - sigma * rate * x, noise, sigmas))
    factor = math.prod(1 + (b - a) * rate for a, b in pairwise(sigmas))
    torch.testing.assert_close(steps[-1].next_state(), noise * factor, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(GRIDS)
def test_straight_path_ends_at_its_target_and_passes_through_the_mixtures(sigmas):
    """v = noise - x0, constant: x_k = (1 - s_k) x0 + s_k noise on every grid that starts at 1."""
    sigmas = (1.0, *(s for s in sigmas if s < 1.0))
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 1, 2, 3, 3, generator=generator)
    for step in rollout(lambda x, sigma: x - sigma * (noise - x0), noise, sigmas):
        torch.testing.assert_close(step.x, (1 - step.sigma) * x0 + step.sigma * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.next_state(), x0, rtol=1e-4, atol=1e-5)


def test_last_euler_step_is_x0_itself():
    x, x0 = torch.randn(2, 4)
    assert torch.equal(euler_step(x, x0, 0.5, 0.0), x0)


def test_states_are_detached_fp32_and_only_gradient_steps_have_graphs():
    weight = torch.tensor(0.7, requires_grad=True)
    noise = torch.randn(1, 2, 2, 2, dtype=torch.bfloat16)
    steps = list(rollout(lambda x, sigma: x * weight, noise, SIGMAS, grad_steps={1, 3}))
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert [s.x0.requires_grad for s in steps] == [False, True, False, True]
    assert not any(s.x.requires_grad or s.next_state().requires_grad for s in steps)
    assert all(s.x.dtype == torch.float32 for s in steps)
    assert torch.is_grad_enabled()


def test_the_callers_grad_mode_survives_a_half_consumed_rollout():
    steps = rollout(lambda x, sigma: x, torch.zeros(1, 1, 1, 1), SIGMAS)
    next(steps)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        next(steps)
    assert torch.is_grad_enabled()


def test_rollout_is_lazy():
    calls = []
    for step in rollout(lambda x, sigma: calls.append(sigma) or x, torch.zeros(1, 1, 1, 1), SIGMAS):
        if step.index == 1:
            break
    assert calls == [1.0, 0.9]


def test_sample_is_the_rollouts_end_without_a_graph():
    denoiser, pairs = ToyDenoiser(), make_pairs(2)
    conditions = [p.student for p in pairs]
    noise = torch.randn(2, 4, 4, 4).to(DEVICE)
    latents = sample(denoiser, conditions, noise, SIGMAS)
    x = noise
    for sigma, sigma_next in pairwise(SIGMAS):
        velocity = (x - denoiser.predict_x0(x, sigma, conditions)) / sigma
        x = x + (sigma_next - sigma) * velocity
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    assert denoiser.grad_modes[:4] == [False] * 4


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.5), (1.0, 0.5, 0.5, 0.0), (0.5, 1.0, 0.0), (1.5, 0.0)])
def test_grids_that_do_not_fall_to_zero_are_refused(sigmas):
    with pytest.raises(ValueError, match="decrease strictly"):
        next(rollout(lambda x, sigma: x, torch.zeros(1, 1, 1, 1), sigmas))
