"""Few-step noise schedules, and the time convention of the package.

`sigma` goes from 1 (pure noise) to 0 (clean): x = (1 - sigma) * x0 + sigma * noise. The velocity is v = dx/dsigma =
noise - x0, so x0_hat = x - sigma * v. For networks with reversed time (t = 1 - sigma) or that predict -v, the host
converts.

A grid of n steps has n + 1 values, strictly decreasing from 1 to 0; a rollout evaluates the model at all but the last.
"""

from __future__ import annotations

import math

Z_IMAGE_SHIFT = 3.0
KREA2_MU = 1.15
"""Logarithm of Krea 2 Turbo's shift. The undistilled Krea-2-Raw has one that grows with the resolution."""
QWEN_IMAGE21_TURBO = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0)
"""The eight steps that Qwen-Image 2.1 Turbo was distilled for, as published; no shift gives them."""


def shift_sigma(u: float, shift: float) -> float:
    """s = shift * u / (1 + (shift - 1) * u): shifts u in [0, 1] towards noise for shift > 1; 0 and 1 are fixed."""
    # Written with 1 - u so that u = 1 gives exactly 1 at every shift.
    return shift * u / (shift * u + (1.0 - u))


def shifted_sigmas(num_steps: int, shift: float) -> tuple[float, ...]:
    """num_steps + 1 values: linspace(1, 1/n, n), shifted, followed by 0.

    Raises:
        ValueError: num_steps < 1 or shift <= 0.
    """
    _check_steps(num_steps)
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return (*(shift_sigma((num_steps - i) / num_steps, shift) for i in range(num_steps)), 0.0)


def z_image_turbo_sigmas(num_steps: int) -> tuple[float, ...]:
    """Z-Image-Turbo's grid, the same at every resolution. n = 4: 1, .9, .75, .5, 0 (training); n = 8 for inference."""
    return shifted_sigmas(num_steps, Z_IMAGE_SHIFT)


def krea2_turbo_sigmas(num_steps: int) -> tuple[float, ...]:
    """Krea 2 Turbo's grid, the same at every resolution. n = 8: 1, .956724, ..., .310901, 0."""
    return shifted_sigmas(num_steps, math.exp(KREA2_MU))


def qwen_image21_turbo_sigmas(num_steps: int) -> tuple[float, ...]:
    """Qwen-Image 2.1 Turbo's grid, the same at every resolution; n = 8 is the published list.

    Other grids are read from it at equal distances, between its values linearly: n = 4 takes every second value.

    Raises:
        ValueError: num_steps < 1.
    """
    _check_steps(num_steps)
    places = [step * (len(QWEN_IMAGE21_TURBO) - 1) / num_steps for step in range(num_steps)]
    pairs = [(QWEN_IMAGE21_TURBO[int(place)], QWEN_IMAGE21_TURBO[int(place) + 1], place % 1) for place in places]
    return (*(first + part * (second - first) for first, second, part in pairs), 0.0)


def flux2_klein_sigmas(num_steps: int, width: int, height: int) -> tuple[float, ...]:
    """FLUX.2-klein's grid for an image of width x height PIXELS (the shift grows with the number of tokens, W*H/256).

    4 steps at 1024x1024: 1, .967384, .908144, .767200, 0.

    Raises:
        ValueError: num_steps < 1, or the image is smaller than one 16x16 token.
    """
    _check_steps(num_steps)
    if width < 16 or height < 16:
        raise ValueError(f"the image must have at least 16x16 pixels, got {width}x{height}")
    mu = flux2_empirical_mu(width * height / 256, num_steps)
    # exp(mu) / (exp(mu) + 1/u - 1) is the shift above with shift = exp(mu).
    return shifted_sigmas(num_steps, math.exp(mu))


def flux2_empirical_mu(num_tokens: float, num_steps: int) -> float:
    """Logarithm of FLUX.2's shift: linear in num_steps between fits at 10 and 200 steps, which are linear in tokens."""
    mu_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return mu_200
    mu_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (mu_200 - mu_10) / 190.0
    return mu_200 + slope * (num_steps - 200.0)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
