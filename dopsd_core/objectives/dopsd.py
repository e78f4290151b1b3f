"""D-OPSD (arXiv 2605.05204, Eq. 7): on-policy self-distillation along the student's few-step trajectory.

At the student's own states x_k, the student with the caption regresses the teacher with caption and image,
L = mean_k mean((v_student - sg(v_teacher))^2). States are detached, so L is a sum of independent graphs: a backward
after each step gives the same gradient as one backward over all K, with the activations of a single step in memory.

Legend: B batch, C latent channels, h w latent size, K rollout steps; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from ..rollout import rollout
from .base import Objective, ObjectiveInputs, ObjectiveOutput, compare, predict, predictor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
    from typing_extensions import Self

    from ..conditioning.encode import Condition
    from ..trainable import Mode
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

LossForm = Literal["x0", "velocity"]

_TEACHER = "the teacher's prediction"


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


class DOPSD(Objective):
    """On-policy self-distillation along the student's rollout (arXiv 2605.05204, Eq. 7)."""

    name: ClassVar[str] = "dopsd"
    summary: ClassVar[str] = "self-distillation from a teacher that sees the image"

    grad_steps: Annotated[int | None, Hint(most=16, none="all of the steps")] = Field(
        default=None,
        ge=1,
        description="number of the K steps to backpropagate through, sampled at random: unbiased, cheaper, noisier",
    )
    loss: LossForm = Field(
        default="x0",
        description="space of the loss: x0 converges faster, velocity is the paper's",
    )
    anchor_probability: Annotated[float, Hint(step=0.05)] = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of batches that are prior anchors: ordinary prompts with the untouched network as teacher, "
        "which prevents leakage of the concept into them",
    )

    def problems(self, rollout_steps: int) -> Sequence[str]:
        """Reports more gradient steps than rollout steps."""
        if self.grad_steps is None or self.grad_steps <= rollout_steps:
            return ()
        return (
            f"grad_steps is {self.grad_steps}; set it to a value from 1 to rollout_steps ({rollout_steps}), "
            "or null for all of the steps",
        )

    def remarks(self) -> Sequence[str]:
        """Reports that every batch is a prior anchor."""
        if self.anchor_probability < 1:
            return ()
        return (
            "anchor_probability is 1: every batch is a prior anchor, so no image is trained; lower it, such as to 0.5",
        )

    @property
    def wants_anchors(self) -> bool:
        """Whether some batches are prior anchors."""
        return self.anchor_probability > 0

    def without_anchors(self) -> Self:
        """The same objective without prior anchors."""
        return self.replace(anchor_probability=0.0)

    def on_fewer_steps(self, count: int, rollout_steps: int) -> Self:
        """Sets `grad_steps` if it is not set."""
        return self if self.grad_steps is not None or count >= rollout_steps else self.replace(grad_steps=count)

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One rollout from `inputs.noise`, with a backward after each gradient step.

        Raises:
            ValueError: grad_steps exceeds K, or there are no anchors although anchor_probability is above 0.
        """
        # Steps are sampled before the anchor, so that runs with and without anchors use the same gradient steps.
        selected = self._draw_steps(inputs)
        is_anchor = self._draw_anchor(inputs)
        if is_anchor:
            student = teacher = _draw_conditions(inputs)
            teacher_mode: Mode = "off"
        else:
            student, teacher = [p.student for p in inputs.pairs], [p.teacher for p in inputs.pairs]
            teacher_mode = "teacher"
        stats = []
        steps = rollout(predictor(inputs, "student", student), inputs.noise, inputs.sigmas, grad_steps=selected)
        for step in steps:
            if step.index in selected:
                x0_teacher = predict(inputs, teacher_mode, teacher, step.x, step.sigma)
                loss = self_distillation_loss(step.x0, x0_teacher, step.sigma, self.loss)
                # Checkpointed blocks run their forward again here, with the student's weights.
                with inputs.adapters.use("student"):
                    (loss * (inputs.loss_scale / len(selected))).backward()
                stats.append((step.index, step.sigma, compare(step, x0_teacher, loss)))
            if step.index == max(selected):
                break
        return ObjectiveOutput.of(stats, "the untouched model's prediction" if is_anchor else _TEACHER, is_anchor)

    def _draw_steps(self, inputs: ObjectiveInputs) -> frozenset[int]:
        num_steps = len(inputs.sigmas) - 1
        if self.grad_steps is None:
            return frozenset(range(num_steps))
        if self.grad_steps > num_steps:
            raise ValueError(f"grad_steps is {self.grad_steps}, but the rollout has only {num_steps} steps; lower it")
        order = torch.randperm(num_steps, generator=inputs.generator)
        return frozenset(order[: self.grad_steps].tolist())

    def _draw_anchor(self, inputs: ObjectiveInputs) -> bool:
        if self.anchor_probability > 0 and not inputs.anchors:
            raise ValueError("anchor_probability is above 0 but there are no anchor captions; add some or set it to 0")
        return torch.rand((), generator=inputs.generator).item() < self.anchor_probability


def measure_gap(
    inputs: ObjectiveInputs, form: LossForm = "x0", student_mode: Mode = "student", teacher_mode: Mode = "teacher"
) -> ObjectiveOutput:
    """Measures the distance to the teacher along the student's rollout, without gradients."""
    student, teacher = [p.student for p in inputs.pairs], [p.teacher for p in inputs.pairs]
    stats = []
    for step in rollout(predictor(inputs, student_mode, student), inputs.noise, inputs.sigmas):
        x0_teacher = predict(inputs, teacher_mode, teacher, step.x, step.sigma)
        loss = self_distillation_loss(step.x0, x0_teacher, step.sigma, form)
        stats.append((step.index, step.sigma, compare(step, x0_teacher, loss)))
    return ObjectiveOutput.of(stats, _TEACHER)


def _draw_conditions(inputs: ObjectiveInputs) -> list[Condition]:
    chosen = torch.randint(len(inputs.anchors), (len(inputs.pairs),), generator=inputs.generator)
    return [inputs.anchors[i] for i in chosen.tolist()]
