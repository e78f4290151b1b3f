"""What an objective is given and gives back: it turns a micro batch into accumulated gradients.

Legend: B batch, C latent channels, h w latent size, K rollout steps; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..lazy import lazy
from ..options import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
    from typing_extensions import Self

    from ..conditioning.encode import Condition, DualCondition
    from ..denoiser import Denoiser
    from ..rollout import PredictX0, RolloutStep
    from ..trainable import Mode, Trainable
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


@dataclass(frozen=True, eq=False)
class ObjectiveInputs:
    """One micro batch. All randomness of an objective comes from `generator`, `noise` aside.

    Attributes:
        denoiser: the frozen network, which the adapters are attached to.
        adapters: whose gradients are made.
        pairs: B, of one latent shape.
        noise: [B, C, h, w] fp32 on the denoiser's device.
        sigmas: the grid, K + 1 values.
        generator: on the CPU.
        anchors: conditions without the trigger to draw from.
        loss_scale: what losses are multiplied by before their backward: 1 / gradient accumulation, and in fp16 the
            factor of `training/loss_scale.py`.
    """

    denoiser: Denoiser
    adapters: Trainable
    pairs: Sequence[DualCondition]
    noise: Tensor
    sigmas: Sequence[float]
    generator: torch.Generator
    anchors: Sequence[Condition] = ()
    loss_scale: float = 1.0


@dataclass(frozen=True)
class StepStats:
    """Student against target on one state, means over the batch.

    Attributes:
        index: which state, from 0.
        sigma: its noise level, in (0, 1].
        loss: of this state, unscaled.
        gap: rms distance of the velocities.
        cosine: of the velocities.
        norm_ratio: the student's velocity over the target's.
        student_norm: of the student's velocity.
        target_norm: of the target's velocity.
    """

    index: int
    sigma: float
    loss: float
    gap: float
    cosine: float
    norm_ratio: float
    student_norm: float
    target_norm: float


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a micro batch gave.

    Attributes:
        loss: mean over the batch, unscaled.
        metrics: further figures for the log by name, means over the batch, all of them numbers.
        steps: student against target on each state, of objectives that compare velocities.
        target: what the student was compared with, for messages.
        is_anchor: the batch was a prior anchor: its metrics say nothing of the concept.
    """

    loss: float
    metrics: Mapping[str, float]
    steps: tuple[StepStats, ...] = ()
    target: str = "the target"
    is_anchor: bool = False

    @classmethod
    def of(cls, stats: Sequence[tuple[int, float, Tensor]], target: str, is_anchor: bool = False) -> ObjectiveOutput:
        """From (index, sigma, `compare`'s figures) of each state; reads the figures back from the device."""
        rows = torch.stack([values for _, _, values in stats]).tolist()
        steps = tuple(StepStats(index, sigma, *row) for (index, sigma, _), row in zip(stats, rows, strict=True))
        metrics = {name: _mean([getattr(s, name) for s in steps]) for name in ("gap", "cosine", "norm_ratio")}
        return cls(_mean([s.loss for s in steps]), metrics, steps, target, is_anchor)

    @property
    def not_finite(self) -> str:
        """Which prediction was the first to be infinite or NaN, and where; "" if none was."""
        for s in self.steps:
            norms = (("the student's prediction", s.student_norm), (self.target, s.target_norm))
            if names := [name for name, norm in norms if not math.isfinite(norm)]:
                return f"{' and '.join(names)} at sigma {s.sigma:.3g}"
        return ""


class Objective(Variant):
    """What is learned. Owns the maths of a step; the trainer owns its order (clip, optimizer, teacher update)."""

    relative_cost: ClassVar[float] = 1.0
    """About what an optimizer step costs, in steps of D-OPSD."""

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Adds loss_scale * dL/dtheta to the gradients of `inputs.adapters.parameters()`; the mode stays as it was."""
        raise NotImplementedError

    def problems(self, rollout_steps: int) -> Sequence[str]:
        """What does not fit a rollout of K steps, a sentence each."""
        return ()

    @property
    def wants_anchors(self) -> bool:
        """Whether it draws from the prior anchors, so that there have to be some."""
        return False

    def without_anchors(self) -> Self:
        """The same for data that has no prior anchors."""
        return self

    def on_fewer_steps(self, count: int, rollout_steps: int) -> Self:
        """The same with gradients on `count` of the K steps alone, where that saves something and was left open."""
        return self


# -- for objectives ---------------------------------------------------------------------------------------------------


def predictor(inputs: ObjectiveInputs, mode: Mode, conditions: Sequence[Condition]) -> PredictX0:
    """(x [B, C, h, w], sigma) -> x0_hat by the weights of `mode` under B conditions, in the caller's grad mode."""

    def predict(x: Tensor, sigma: float) -> Tensor:
        with inputs.adapters.use(mode):
            return inputs.denoiser.predict_x0(x, sigma, conditions)

    return predict


def predict(inputs: ObjectiveInputs, mode: Mode, conditions: Sequence[Condition], x: Tensor, sigma: float) -> Tensor:
    """x0_hat [B, C, h, w] fp32 of x at sigma, without a graph."""
    with torch.no_grad():
        return predictor(inputs, mode, conditions)(x, sigma).float()


def compare(step: RolloutStep, x0_target: Tensor, loss: Tensor) -> Tensor:
    """The figures of `StepStats` from loss on, on the device: read back once per batch, not once per step."""
    with torch.no_grad():
        v_student = ((step.x - step.x0.detach()) / step.sigma).flatten(1)
        v_target = ((step.x - x0_target) / step.sigma).flatten(1)
        gap = (v_student - v_target).square().mean().sqrt()
        cosine = F.cosine_similarity(v_student, v_target, dim=1).mean()
        norms = v_student.norm(dim=1), v_target.norm(dim=1)
        ratio = (norms[0] / norms[1].clamp_min(1e-12)).mean()
        return torch.stack([loss.detach(), gap, cosine, ratio, norms[0].mean(), norms[1].mean()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
