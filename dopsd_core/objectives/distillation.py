"""Self-distillation at the states of a few-step trajectory, for `dopsd` and for the prior anchor of any objective.

Legend: B batch, C latent channels, h w latent size, K rollout steps; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

from ..lazy import lazy
from ..rollout import RolloutStep, rollout
from ..transfer import to_device
from .base import ObjectiveInputs, ObjectiveOutput, compare, draw, predict, predictor
from .step_draws import weights_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from ..conditioning.encode import Condition
    from ..trainable import Mode
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

LossForm = Literal["x0", "velocity"]

States = Literal["own", "data", "teacher"]
"""The states that are trained: of the student's own trajectory, noised target images, or of the teacher's."""

Target = Literal["teacher", "ground_truth"]
"""What the student's prediction regresses: the teacher's prediction, or the target image."""

TEACHER = "the teacher's prediction"
UNTOUCHED = "the untouched model's prediction"
IMAGE = "the target latent"


@dataclass(frozen=True, eq=False)
class Sides:
    """What student and teacher see, and the teacher's weights.

    Attributes:
        student: B conditions of the student.
        teacher: B conditions of the teacher.
        teacher_mode: the weights of the teacher.
    """

    student: Sequence[Condition]
    teacher: Sequence[Condition]
    teacher_mode: Mode = "teacher"

    @classmethod
    def of_pairs(cls, inputs: ObjectiveInputs) -> Sides:
        """Caption against caption and image."""
        return cls([pair.student for pair in inputs.pairs], [pair.teacher for pair in inputs.pairs])

    @classmethod
    def of_anchors(cls, inputs: ObjectiveInputs) -> Sides:
        """As many random anchors as there are pairs, against the untouched network; draws from the generator."""
        conditions = draw(inputs.anchors, len(inputs.pairs), inputs.generator)
        return cls(conditions, conditions, "off")


@dataclass(frozen=True)
class Teaching:
    """How the student is taught at a state.

    Attributes:
        form: space of the loss.
        states: the states.
        target: what the student regresses.
    """

    form: LossForm = "x0"
    states: States = "own"
    target: Target = "teacher"


def self_distillation_loss(x0_student: Tensor, x0_teacher: Tensor, sigma: float, form: LossForm = "x0") -> Tensor:
    """Eq. 7 at one state: mean squared difference of x0 (default) or velocities, a scalar.

    The velocity form is the x0 form / sigma^2.

    Args:
        x0_student: [B, C, h, w], with graph.
        x0_teacher: [B, C, h, w], detached here.
        sigma: noise level in (0, 1].
        form: "x0" or "velocity".
    """
    if form not in get_args(LossForm):
        raise ValueError(f"loss form must be one of {', '.join(get_args(LossForm))}; got {form!r}")
    loss = F.mse_loss(x0_student, x0_teacher.detach())
    return loss / sigma**2 if form == "velocity" else loss


def distill(
    inputs: ObjectiveInputs, sides: Sides, selected: Collection[int], teaching: Teaching
) -> list[tuple[int, float, Tensor]]:
    """A backward at each of the selected states; returns (index, sigma, `compare`'s result [6]) of each.

    The loss is the mean over the selected states, or the sum with their weights if `selected` is a mapping to these.

    With `ground_truth`, the target is the image at every state: its velocity leads from the state to the image, which
    is noise - image on noised images.

    Raises:
        ValueError: a pair has no target latent, and the states or the target need it.
    """
    stats, weights = [], weights_of(selected)
    for step in _visited(inputs, sides, selected, teaching.states):
        x0_target = _target(inputs, sides, step, teaching)
        loss = self_distillation_loss(step.x0, x0_target, step.sigma, teaching.form)
        # Checkpointed blocks run their forward again here, with the student's weights.
        with inputs.adapters.use("student"):
            (loss * (inputs.loss_scale * weights[step.index])).backward()
        stats.append((step.index, step.sigma, compare(step, x0_target, loss)))
    return stats


def measure_gap(
    inputs: ObjectiveInputs, form: LossForm = "x0", student_mode: Mode = "student", teacher_mode: Mode = "teacher"
) -> ObjectiveOutput:
    """Measures the distance to the teacher along the student's rollout, without gradients."""
    sides = Sides.of_pairs(inputs)
    stats = []
    for step in rollout(predictor(inputs, student_mode, sides.student), inputs.noise, inputs.sigmas):
        x0_teacher = predict(inputs, teacher_mode, sides.teacher, step.x, step.sigma)
        loss = self_distillation_loss(step.x0, x0_teacher, step.sigma, form)
        stats.append((step.index, step.sigma, compare(step, x0_teacher, loss)))
    return ObjectiveOutput.of(stats, TEACHER)


def target_latents(inputs: ObjectiveInputs, user: str) -> Tensor:
    """The targets of the pairs, [B, C, h, w] fp32 on the noise's device.

    Raises:
        ValueError: a pair has none; the message names `user`, which needs it.
    """
    latents = []
    for pair in inputs.pairs:
        if pair.target_latent is None:
            raise ValueError(f"{user} needs target latents; {pair.caption!r} has none, encode it with its image")
        latents.append(to_device(pair.target_latent, inputs.noise.device, torch.float32))
    return torch.stack(latents)


def _target(inputs: ObjectiveInputs, sides: Sides, step: RolloutStep, teaching: Teaching) -> Tensor:
    """The target x0 [B, C, h, w] at a state."""
    if teaching.target == "teacher":
        return predict(inputs, sides.teacher_mode, sides.teacher, step.x, step.sigma)
    return target_latents(inputs, "regression_target ground_truth")


def _visited(inputs: ObjectiveInputs, sides: Sides, selected: Collection[int], states: States) -> Iterator[RolloutStep]:
    """The selected states, each with the student's prediction with its graph; computes no state after the last one."""
    student = predictor(inputs, "student", sides.student)
    if states == "own":
        path = rollout(student, inputs.noise, inputs.sigmas, grad_steps=selected)
    elif states == "teacher":
        path = rollout(predictor(inputs, sides.teacher_mode, sides.teacher), inputs.noise, inputs.sigmas)
    else:
        path = _noised_targets(inputs)
    for step in path:
        if step.index in selected:
            yield step if states == "own" else replace(step, x0=student(step.x, step.sigma).float())
        if step.index == max(selected):
            return


def _noised_targets(inputs: ObjectiveInputs) -> Iterator[RolloutStep]:
    """The targets at every sigma of the grid, with the same noise; x0 is the target."""
    targets, noise = target_latents(inputs, "states data"), inputs.noise.float()
    for index, (sigma, sigma_next) in enumerate(pairwise(inputs.sigmas)):
        yield RolloutStep(index, sigma, sigma_next, torch.lerp(targets, noise, sigma), targets)
