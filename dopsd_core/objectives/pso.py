"""Pairwise Sample Optimization (arXiv 2410.03190): prefer the training image to an own one at the distilled sigmas.

The winner is the training image, the loser one that the untouched model drew before training from the anchor captions
(`training/class_images.py`). Both get the same noise and the same sigma, one of the K of the rollout, and are
conditioned on the caption of the training image. L_w, L_l are the velocity MSE, and d = L_w - 0.1 L_l:

    dpo            -log sigmoid(beta (d_ref - d)), with d_ref of the untouched network
    no_reference   relu(1 + 5 d) + 0.5 L_l, the authors' "pso_db"

Legend: B batch, C latent channels, h w latent size; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from ..rollout import RolloutStep
from ..transfer import to_device
from .base import Objective, ObjectiveInputs, ObjectiveOutput, compare, draw
from .distillation import IMAGE, target_latents

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from ..conditioning.encode import Condition, DualCondition
    from ..trainable import Mode
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

Form = Literal["no_reference", "dpo"]

_LOSER = 0.1
"""Weight of the loser in the preference d."""
_MARGIN, _SLOPE, _LOSER_TERM = 1.0, 5.0, 0.5
"""The authors' settings of the form without a reference."""


@dataclass(frozen=True, eq=False)
class _Contest:
    """Winner and loser, images [2, C, h, w], with the same noise [C, h, w], sigma and caption."""

    images: Tensor
    noise: Tensor
    sigma: float
    condition: Condition

    @property
    def x(self) -> Tensor:
        return torch.lerp(self.images, self.noise.expand_as(self.images), self.sigma)

    def predict(self, inputs: ObjectiveInputs, mode: Mode) -> Tensor:
        """x0_hat [2, C, h, w] with the weights of `mode`."""
        with inputs.adapters.use(mode):
            return inputs.denoiser.predict_x0(self.x, self.sigma, [self.condition] * 2).float()

    def errors(self, x0: Tensor) -> Tensor:
        """L_w and L_l, [2], of predictions [2, C, h, w]."""
        velocities = (self.x - x0) / self.sigma
        return (velocities - (self.noise - self.images)).square().flatten(1).mean(1)


class PSO(Objective):
    """A preference for the training image over an image of the untouched model, at the few-step noise levels."""

    name: ClassVar[str] = "pso"
    summary: ClassVar[str] = "prefers the images to those that the untouched model draws first, a baseline"
    prefix: ClassVar[str] = "pso_"
    relative_cost: ClassVar[float] = 0.6

    form: Form = Field(
        default="no_reference",
        description="the loss of the authors' scripts, or DPO with the untouched network as reference",
    )
    beta: Annotated[float, Hint(step=10.0, most=100_000.0)] = Field(
        default=200.0, gt=0, description="strength of the preference (dpo only)"
    )
    loser_images: Annotated[int, Hint(most=1000)] = Field(
        default=20,
        ge=1,
        description="number of images that the untouched model draws from the anchor captions before training",
    )

    @property
    def drawn_images(self) -> int:
        """The number of losers."""
        return self.loser_images

    @property
    def uses_teacher(self) -> bool:
        """The target is the image."""
        return False

    def forward_batch(self, batch_size: int) -> int:
        """Winner and loser."""
        return 2

    def data_problems(self, pairs: Sequence[DualCondition], anchors: Sequence[Condition]) -> Sequence[str]:
        """Reports missing anchor captions, and edits, whose losers would be drawn without the source."""
        edits = any(pair.student.reference_latents for pair in pairs)
        about_edits = "objective pso does not train edits, because its losers are drawn from captions; use dopsd or sft"
        return (*super().data_problems(pairs, anchors), *((about_edits,) if edits else ()))

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One backward per pair, at one of the grid's sigmas with `inputs.noise` for winner and loser.

        Raises:
            ValueError: a pair has no target latent, or no loser has its shape.
        """
        stats, losers = [], []
        winners = target_latents(inputs, self.name)
        for pair, winner, noise in zip(inputs.pairs, winners, inputs.noise.float(), strict=True):
            images = torch.stack([winner, _draw_loser(inputs, winner)])
            (place,) = draw(range(len(inputs.sigmas) - 1), 1, inputs.generator)
            contest = _Contest(images, noise, inputs.sigmas[place], pair.student)
            x0 = contest.predict(inputs, "student")
            errors = contest.errors(x0)
            loss = self._loss(errors, contest, inputs)
            with inputs.adapters.use("student"):
                (loss * (inputs.loss_scale / len(inputs.pairs))).backward()
            step = RolloutStep(place, contest.sigma, 0.0, contest.x[:1], x0[:1])
            stats.append((place, contest.sigma, compare(step, winner[None], loss)))
            losers.append(errors[1].detach())
        output = ObjectiveOutput.of(stats, IMAGE)
        return replace(output, metrics={**output.metrics, "loser_loss": torch.stack(losers).mean().item()})

    def _loss(self, errors: Tensor, contest: _Contest, inputs: ObjectiveInputs) -> Tensor:
        """The loss of one pair, a scalar, from its errors L_w and L_l, [2]."""
        if self.form == "no_reference":
            return F.relu(_MARGIN + _SLOPE * _preference(errors)) + _LOSER_TERM * errors[1]
        with torch.no_grad():
            reference = _preference(contest.errors(contest.predict(inputs, "off")))
        return -F.logsigmoid(self.beta * (reference - _preference(errors)))


def _preference(errors: Tensor) -> Tensor:
    """d = L_w - 0.1 L_l."""
    return errors[0] - _LOSER * errors[1]


def _draw_loser(inputs: ObjectiveInputs, winner: Tensor) -> Tensor:
    """A random loser [C, h, w] of the winner's shape."""
    fitting = [drawn.latent for drawn in inputs.class_images if drawn.latent.shape == winner.shape]
    if not fitting:
        raise ValueError(
            f"pso needs losers of shape {tuple(winner.shape)}; train with anchor captions to draw them from"
        )
    return to_device(draw(fitting, 1, inputs.generator)[0], winner.device, torch.float32)
