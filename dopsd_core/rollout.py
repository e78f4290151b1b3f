"""The student's few-step trajectory (arXiv 2605.05204, section 3): Euler steps on the model's grid, states detached.

Legend: B batch, C latent channels, h w latent size, K steps; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .conditioning.encode import Condition
    from .denoiser import Denoiser
else:
    torch = lazy("torch")

PredictX0 = Callable[["Tensor", float], "Tensor"]
"""(x [B, C, h, w] fp32, sigma) -> x0_hat [B, C, h, w]."""


@dataclass(frozen=True, eq=False)
class RolloutStep:
    """State x_k of the trajectory and the prediction from it.

    Attributes:
        index: k in 0..K-1.
        sigma: s_k in (0, 1].
        sigma_next: s_{k+1} in [0, 1).
        x: [B, C, h, w] fp32, detached.
        x0: [B, C, h, w], the prediction; has a graph only on gradient steps.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    x0: Tensor

    def next_state(self) -> Tensor:
        """x_{k+1} [B, C, h, w], detached; x0 at the last step of a grid (sigma_next = 0)."""
        return euler_step(self.x, self.x0.detach(), self.sigma, self.sigma_next)


def euler_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma_next - sigma) * v with v = (x - x0) / sigma, for x, x0 [B, C, h, w]; exactly x0 at sigma_next = 0."""
    return torch.lerp(x0, x, sigma_next / sigma) if sigma_next > 0 else x0


def rollout(
    predict_x0: PredictX0, noise: Tensor, sigmas: Sequence[float], grad_steps: Container[int] = ()
) -> Iterator[RolloutStep]:
    """Yields the K steps of the trajectory from `noise` [B, C, h, w] lazily, so that a caller may stop early.

    Predictions at `grad_steps` use the caller's grad mode, all others have no graph. The state is updated with the
    detached prediction, so the K graphs are independent: call backward on each step before requesting the next one to
    keep only one step's activations in memory. The state is fp32.

    Raises:
        ValueError: sigmas do not decrease strictly to 0, or are fewer than two.
    """
    _check_grid(sigmas)
    x = noise.detach().float()
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index in grad_steps):
            x0 = predict_x0(x, sigma).float()
        step = RolloutStep(index, sigma, sigma_next, x, x0)
        x = step.next_state()
        yield step


def sample(denoiser: Denoiser, conditions: Sequence[Condition], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The few-step Euler sampler: noise [B, C, h, w] -> x0 latents [B, C, h, w], without a graph."""
    latents = noise
    with torch.no_grad():
        for step in rollout(lambda x, sigma: denoiser.predict_x0(x, sigma, conditions), noise, sigmas):
            latents = step.next_state()
    return latents


def _check_grid(sigmas: Sequence[float]) -> None:
    falls = all(a > b for a, b in pairwise(sigmas))
    if len(sigmas) < 2 or not falls or sigmas[-1] != 0 or sigmas[0] > 1:
        raise ValueError(f"sigmas must be at least two and decrease strictly from at most 1 to 0, got {tuple(sigmas)}")
