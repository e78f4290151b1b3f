"""Grids against published numbers and against diffusers; the shift's identities."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd_core.sigmas import (
    KREA2_MU,
    flux2_klein_sigmas,
    krea2_turbo_sigmas,
    shift_sigma,
    shifted_sigmas,
    z_image_turbo_sigmas,
)

KLEIN_GRIDS = {
    (1024, 1024): (1, 0.967384, 0.908144, 0.767200, 0),
    (1152, 896): (1, 0.967212, 0.907690, 0.766229, 0),
    (768, 768): (1, 0.962234, 0.894658, 0.738969, 0),
    (512, 512): (1, 0.958085, 0.883982, 0.717497, 0),
}


def test_z_image_turbo_training_grid():
    assert z_image_turbo_sigmas(4) == pytest.approx((1, 0.9, 0.75, 0.5, 0), abs=1e-15)


def test_z_image_turbo_inference_grid():
    expected = (1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0)
    assert z_image_turbo_sigmas(8) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("size", KLEIN_GRIDS)
def test_flux2_klein_grid(size):
    assert flux2_klein_sigmas(4, *size) == pytest.approx(KLEIN_GRIDS[size], abs=5e-7)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 8, 20])
def test_z_image_grid_is_that_of_diffusers(num_steps):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = pytest.importorskip("diffusers.pipelines.z_image.pipeline_z_image")
    scheduler.set_timesteps(sigmas=pipeline.get_default_z_image_sigmas(num_steps))
    assert z_image_turbo_sigmas(num_steps) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 8, 20])
def test_krea2_grid_is_that_of_diffusers(num_steps):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=KREA2_MU)
    assert krea2_turbo_sigmas(num_steps) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


@pytest.mark.parametrize(
    ("num_steps", "size"), [(4, (1024, 1024)), (4, (832, 1248)), (8, (512, 512)), (4, (2048, 1152))]
)
def test_flux2_klein_grid_is_that_of_diffusers(num_steps, size):
    flux2 = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    mu = flux2.compute_empirical_mu(image_seq_len=size[0] * size[1] // 256, num_steps=num_steps)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=mu)
    assert flux2_klein_sigmas(num_steps, *size) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0.05, 50))
def test_grids_fall_from_one_to_zero(num_steps, shift):
    sigmas = shifted_sigmas(num_steps, shift)
    assert len(sigmas) == num_steps + 1
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in pairwise(sigmas))


@settings(deadline=None)
@given(st.floats(0.001, 0.999), st.floats(0.05, 50))
def test_shift_multiplies_the_odds_of_noise(u, shift):
    s = shift_sigma(u, shift)
    assert math.isclose(s / (1 - s), shift * u / (1 - u), rel_tol=1e-9)


@pytest.mark.parametrize(
    "call", [lambda: shifted_sigmas(0, 3), lambda: shifted_sigmas(4, 0), lambda: flux2_klein_sigmas(4, 8, 64)]
)
def test_impossible_grids_are_refused(call):
    with pytest.raises(ValueError, match=r"got (0|8x64)"):
        call()
