"""The interface of objectives: they turn a micro batch into accumulated gradients.

Legend: B batch, C latent channels, h w latent size, K rollout steps; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

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

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ObjectiveInputs:
    """A micro batch. All randomness of an objective comes from `generator` and `noise`.

    Attributes:
        denoiser: the frozen network with the adapters attached.
        adapters: the trainable weights.
        pairs: B pairs with the same latent shape.
        noise: [B, C, h, w] fp32 on the denoiser's device.
        sigmas: the grid, K + 1 values.
        generator: a CPU generator.
        anchors: conditions without the trigger to sample from.
        class_images: images that the untouched model drew before training, as many as `Objective.drawn_images`, or the
            regularisation images.
        loss_scale: factor of the losses before the backward: 1 / gradient accumulation, times the factor of
            `training/loss_scale.py` for fp16.
        step_losses: mean loss of each of the K rollout steps so far; empty if it is not known.
    """

    denoiser: Denoiser
    adapters: Trainable
    pairs: Sequence[DualCondition]
    noise: Tensor
    sigmas: Sequence[float]
    generator: torch.Generator
    anchors: Sequence[Condition] = ()
    class_images: Sequence[ClassImage] = ()
    loss_scale: float = 1.0
    step_losses: Sequence[float] = ()


@dataclass(frozen=True, eq=False)
class ClassImage:
    """An image that the untouched model drew, or a regularisation image.

    Attributes:
        condition: what it was drawn from, an anchor; the caption of a regularisation image.
        latent: [C, h, w] fp32 in model space.
    """

    condition: Condition
    latent: Tensor


@dataclass(frozen=True)
class StepStats:
    """Student compared with target at one state, averaged over the batch.

    Attributes:
        index: index of the state, from 0.
        sigma: its noise level, in (0, 1].
        loss: unscaled loss at this state.
        gap: RMS distance of the velocities.
        cosine: cosine similarity of the velocities.
        norm_ratio: norm of the student's velocity over the target's.
        student_norm: norm of the student's velocity.
        target_norm: norm of the target's velocity.
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
    """The result of a micro batch.

    Attributes:
        loss: unscaled mean over the batch.
        metrics: further metrics for the log by name, averaged over the batch.
        steps: student compared with target at each state, for objectives that compare velocities.
        target: name of the target in messages.
        is_anchor: whether the batch was a prior anchor, whose metrics do not describe the concept.
    """

    loss: float
    metrics: Mapping[str, float]
    steps: tuple[StepStats, ...] = ()
    target: str = "the target"
    is_anchor: bool = False

    @classmethod
    def of(
        cls, stats: Sequence[tuple[int, float, Tensor]], target: str, is_anchor: bool = False,
        weights: Mapping[int, float] | None = None,
    ) -> ObjectiveOutput:  # fmt: skip
        """Builds the output from (index, sigma, `compare`'s result [6]) of each state; copies from the device once.

        weights: by index, of the losses in their sum; None for the mean. The loss is that sum, the metrics are means
            with these weights, so that states which are drawn more often do not count more.
        """
        rows = torch.stack([values for _, _, values in stats]).tolist()
        steps = tuple(StepStats(index, sigma, *row) for (index, sigma, _), row in zip(stats, rows, strict=True))
        scales = [1.0 if weights is None else weights[s.index] * len(steps) for s in steps]  # exactly 1 for a mean
        loss = _mean([scale * s.loss for scale, s in zip(scales, steps, strict=True)])
        metrics = {
            name: sum(scale * getattr(s, name) for scale, s in zip(scales, steps, strict=True)) / sum(scales)
            for name in ("gap", "cosine", "norm_ratio")
        }
        return cls(loss, metrics, steps, target, is_anchor)

    @property
    def not_finite(self) -> str:
        """The first prediction that is infinite or NaN, and its sigma; "" if there is none."""
        for s in self.steps:
            norms = (("the student's prediction", s.student_norm), (self.target, s.target_norm))
            if names := [name for name, norm in norms if not math.isfinite(norm)]:
                return f"{' and '.join(names)} at sigma {s.sigma:.3g}"
        return ""


class Objective(Variant):
    """Computes loss and gradients of a step; the trainer does the rest (clipping, optimizer, teacher update)."""

    relative_cost: ClassVar[float] = 1.0
    """Approximate cost of an optimizer step relative to D-OPSD."""

    needs_few_steps: ClassVar[bool] = True
    """Whether it trains on what the model draws in its few steps, and is pointless on an undistilled one."""

    takes_regularisation: ClassVar[bool] = False
    """Whether regularisation images, if there are any, are its class images in place of drawn ones."""

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Adds loss_scale * dL/dtheta to the gradients of `inputs.adapters.parameters()`; does not change the mode."""
        raise NotImplementedError

    def course(self, inputs: ObjectiveInputs) -> Hashable:
        """What decides which forwards and backwards `backward` makes, in which mode and order; draws from the
        generator. Ranks that hold a part of the weights each have to make the same ones together."""
        return ()

    def problems(self, rollout_steps: int) -> Sequence[str]:
        """Problems with a rollout of K steps, one sentence each."""
        return ()

    def data_problems(self, pairs: Sequence[DualCondition], anchors: Sequence[Condition]) -> Sequence[str]:
        """Problems with the training data, one sentence each; by default missing anchors."""
        return (missing_anchors(self),) if self.wants_anchors and not anchors else ()

    @property
    def anchor_share(self) -> float:
        """The share of batches that are prior anchors."""
        return 0.0

    @property
    def drawn_images(self) -> int:
        """Number of images that the untouched model draws from the anchors before training."""
        return 0

    def remarks(self) -> Sequence[str]:
        """Warnings about options that are valid but rarely meant, one sentence each."""
        return ()

    @property
    def wants_anchors(self) -> bool:
        """Whether the objective needs the captions of the prior anchors."""
        return self.anchor_share > 0 or self.drawn_images > 0

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher is used for more than the measured gap."""
        return True

    @property
    def uses_rollout(self) -> bool:
        """Whether the noise levels of the K rollout steps are used for more than the measured gap."""
        return True

    def forward_batch(self, batch_size: int) -> int:
        """The number of samples in the largest forward with a graph, for batches of `batch_size`."""
        return batch_size

    def without_anchors(self) -> Self:
        """The same objective for data without prior anchors."""
        return self

    def on_fewer_steps(self, count: int, rollout_steps: int) -> Self:
        """The same objective with gradients on only `count` of the K steps, if that saves time and is not set."""
        return self


def missing_anchors(objective: Objective) -> str:
    """What to do where an objective needs anchor captions and there are none."""
    if objective.drawn_images:
        return (
            f"objective {objective.name} draws class images from the anchor captions, and there are none; add some, or "
            "write the trigger into the captions"
        )
    return (
        f"{objective.prefix}anchor_probability is above 0, but there are no anchor captions; add some, or set it to 0"
    )


# -- helpers of objectives --------------------------------------------------------------------------------------------


def draw(choices: Sequence[T], count: int, generator: torch.Generator) -> list[T]:
    """`count` of the choices at random, with replacement."""
    return [choices[place] for place in torch.randint(len(choices), (count,), generator=generator).tolist()]


def predictor(inputs: ObjectiveInputs, mode: Mode, conditions: Sequence[Condition]) -> PredictX0:
    """(x [B, C, h, w], sigma) -> x0_hat [B, C, h, w] with the weights of `mode` and B conditions."""

    def predict(x: Tensor, sigma: float) -> Tensor:
        with inputs.adapters.use(mode):
            return inputs.denoiser.predict_x0(x, sigma, conditions)

    return predict


def predict(inputs: ObjectiveInputs, mode: Mode, conditions: Sequence[Condition], x: Tensor, sigma: float) -> Tensor:
    """x0_hat [B, C, h, w] fp32 of x [B, C, h, w] at sigma, without a graph."""
    with torch.no_grad():
        return predictor(inputs, mode, conditions)(x, sigma).float()


def compare(step: RolloutStep, x0_target: Tensor, loss: Tensor) -> Tensor:
    """The metrics of `StepStats` from loss on, [6], on the device, so that they are copied once per batch.

    x0_target: [B, C, h, w]; loss: scalar.
    """
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
