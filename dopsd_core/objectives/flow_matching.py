"""Flow matching on clean latents: what supervised fine-tuning and DreamBooth have in common.

Legend: B batch, C latent channels, h w latent size; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from ..rollout import RolloutStep
from ..sigmas import shift_sigma
from .base import Objective, ObjectiveInputs, compare, draw
from .distillation import target_latents

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from ..conditioning.encode import Condition
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

SigmaDistribution = Literal["logit-normal", "uniform", "grid"]

_MIN_SIGMA = 1e-3


class FlowMatching(Objective):
    """An objective that regresses noise - x0 at x = (1 - sigma) x0 + sigma noise, for random sigmas."""

    sigmas: SigmaDistribution = Field(
        default="logit-normal",
        description="distribution of the noise levels: sigmoid of a unit normal, uniform, or the model's own few-step "
        "grid",
    )
    shift: Annotated[float, Hint(step=0.1, most=100.0)] = Field(
        default=3.0, gt=0, description="shifts the noise levels towards noise (not for grid); 1 for no shift"
    )

    @property
    def uses_teacher(self) -> bool:
        """The target is the image."""
        return False

    @property
    def uses_rollout(self) -> bool:
        """Only the distribution "grid" is on the rollout's noise levels."""
        return self.sigmas == "grid"

    def draw_sigma(self, grid: Sequence[float], generator: torch.Generator) -> float:
        """Samples a sigma in (0, 1]. Only "grid" uses `grid`, without its final 0."""
        if self.sigmas == "grid":
            return draw(grid[:-1], 1, generator)[0]
        if self.sigmas == "uniform":
            u = torch.rand((), generator=generator).item()
        else:
            u = torch.randn((), generator=generator).sigmoid().item()
        return max(shift_sigma(u, self.shift), _MIN_SIGMA)

    def regress_pairs(self, inputs: ObjectiveInputs) -> list[tuple[int, float, Tensor]]:
        """A backward per pair, each at its own sigma: (index, sigma, `compare`'s result [6]) of each.

        Raises:
            ValueError: a pair has no target latent.
        """
        stats = []
        targets = target_latents(inputs, type(self).name)
        for index, (pair, target) in enumerate(zip(inputs.pairs, targets.split(1), strict=True)):
            sigma = self.draw_sigma(inputs.sigmas, inputs.generator)
            noise = inputs.noise[index : index + 1].float()
            weight = inputs.loss_scale / len(inputs.pairs)
            stats.append((index, sigma, regress(inputs, pair.student, target, noise, sigma, weight, index)))
        return stats


def regress(
    inputs: ObjectiveInputs,
    condition: Condition,
    target: Tensor,
    noise: Tensor,
    sigma: float,
    weight: float,
    index: int = 0,
) -> Tensor:
    """Backward of weight * mean((v - (noise - target))^2) for one sample; returns `compare`'s result [6].

    target, noise: [1, C, h, w] fp32 on the denoiser's device.
    """
    x = torch.lerp(target, noise, sigma)
    with inputs.adapters.use("student"):
        x0 = inputs.denoiser.predict_x0(x, sigma, [condition]).float()
        loss = F.mse_loss((x - x0) / sigma, noise - target)
        (loss * weight).backward()
    return compare(RolloutStep(index, sigma, 0.0, x, x0), target, loss)
