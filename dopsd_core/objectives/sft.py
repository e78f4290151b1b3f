"""Supervised fine-tuning by flow matching on the target images: the baseline for D-OPSD.

Legend: B batch, C latent channels, h w latent size; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from ..rollout import RolloutStep
from ..sigmas import shift_sigma
from ..transfer import to_device
from .base import Objective, ObjectiveInputs, ObjectiveOutput, compare

if TYPE_CHECKING:
    import torch
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

SigmaDistribution = Literal["logit-normal", "uniform", "grid"]

_MIN_SIGMA = 1e-3


class SFT(Objective):
    """Flow matching on the target latent: x = (1 - sigma) x0 + sigma noise at a random sigma, regress noise - x0."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "ordinary fine-tuning on the images, as a baseline"
    prefix: ClassVar[str] = "sft_"
    relative_cost: ClassVar[float] = 0.35

    sigmas: SigmaDistribution = Field(
        default="logit-normal",
        description="distribution of the noise levels: sigmoid of a unit normal, uniform, or the model's own few-step "
        "grid",
    )
    shift: Annotated[float, Hint(step=0.1, most=100.0)] = Field(
        default=3.0, gt=0, description="shifts the noise levels towards noise (not for grid); 1 for no shift"
    )

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One backward per sample, each at its own sigma; adds `inputs.noise` to the latents.

        Raises:
            ValueError: a pair has no target latent.
        """
        stats = []
        for index, pair in enumerate(inputs.pairs):
            if pair.target_latent is None:
                raise ValueError(f"sft needs target latents; {pair.caption!r} has none, encode it with its image")
            sigma = self.draw_sigma(inputs.sigmas, inputs.generator)
            noise = inputs.noise[index : index + 1].float()
            target = to_device(pair.target_latent, noise.device, torch.float32).unsqueeze(0)
            x = torch.lerp(target, noise, sigma)
            with inputs.adapters.use("student"):
                x0 = inputs.denoiser.predict_x0(x, sigma, [pair.student]).float()
                loss = F.mse_loss((x - x0) / sigma, noise - target)
                (loss * (inputs.loss_scale / len(inputs.pairs))).backward()
            stats.append((index, sigma, compare(RolloutStep(index, sigma, 0.0, x, x0), target, loss)))
        return ObjectiveOutput.of(stats, "the target latent")

    def draw_sigma(self, grid: Sequence[float], generator: torch.Generator) -> float:
        """Samples a sigma in (0, 1]. Only "grid" uses `grid`, without its final 0."""
        if self.sigmas == "grid":
            return grid[int(torch.randint(len(grid) - 1, (), generator=generator).item())]
        if self.sigmas == "uniform":
            u = torch.rand((), generator=generator).item()
        else:
            u = torch.randn((), generator=generator).sigmoid().item()
        return max(shift_sigma(u, self.shift), _MIN_SIGMA)
