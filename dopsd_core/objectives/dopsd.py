"""D-OPSD (arXiv 2605.05204, Eq. 7): on-policy self-distillation along the student's few-step trajectory.

At the student's own states x_k, the student with the caption regresses the teacher with caption and image,
L = mean_k mean((v_student - sg(v_teacher))^2). States are detached, so L is a sum of independent graphs: a backward
after each step gives the same gradient as one backward over all K, with the activations of a single step in memory.

The paper's ablations are options: other states, another target (and other weights of the teacher, `teachers/`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ..options import Hint
from .base import ObjectiveInputs, ObjectiveOutput
from .distillation import (
    IMAGE,
    TEACHER,
    LossForm,
    Sides,
    States,
    Target,
    Teaching,
    distill,
)
from .prior_anchors import WithPriorAnchors
from .step_draws import StepDraw, draw_by_gap, draw_evenly, every_step

if TYPE_CHECKING:
    from typing_extensions import Self


class DOPSD(WithPriorAnchors):
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
        description="space of the loss: x0 as in the authors' code, velocity as in the paper",
    )
    anchor_probability: Annotated[float, Hint(step=0.05)] = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of batches that are prior anchors: ordinary prompts with the untouched network as teacher, "
        "which prevents leakage of the concept into them",
    )
    states: States = Field(
        default="own",
        description="states that are trained: of the student's own trajectory (on-policy), noised training images, or "
        "of the teacher's trajectory; prior anchors are always on-policy",
    )
    regression_target: Target = Field(
        default="teacher",
        description="what the student regresses at these states: the teacher's prediction, or the training image",
    )
    step_draw: StepDraw = Field(
        default="uniform",
        description="how the grad_steps are drawn: all steps alike, or those more often at which the gap has been "
        "larger, with weights that keep the gradient unbiased",
    )

    def problems(self, rollout_steps: int) -> Sequence[str]:
        """Reports more gradient steps than rollout steps."""
        if self.grad_steps is None or self.grad_steps <= rollout_steps:
            return ()
        return (
            f"grad_steps is {self.grad_steps}; set it to a value from 1 to rollout_steps ({rollout_steps}), or null "
            "for all of the steps",
        )

    def remarks(self) -> Sequence[str]:
        """Reports that every batch is a prior anchor, and that there is nothing to draw."""
        remarks = []
        if self.anchor_probability == 1:
            remarks.append(
                "anchor_probability is 1: every batch is a prior anchor, so no image is trained; lower it, such as to "
                "0.5"
            )
        if self.step_draw != "uniform" and self.grad_steps is None:
            remarks.append(f"step_draw {self.step_draw} is not used: grad_steps is not set, so all steps are trained")
        return remarks

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's predictions are trained on or lead to the states."""
        return "teacher" in (self.states, self.regression_target)

    def on_fewer_steps(self, count: int, rollout_steps: int) -> Self:
        """Sets `grad_steps` if it is not set."""
        return self if self.grad_steps is not None or count >= rollout_steps else self.replace(grad_steps=count)

    def course(self, inputs: ObjectiveInputs) -> Hashable:
        """The gradient steps, and whether it is an anchor."""
        selected = self._draw_steps(inputs)
        return tuple(sorted(selected)), self.draw_anchor(inputs)

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One trajectory from `inputs.noise`, with a backward after each gradient step.

        Raises:
            ValueError: grad_steps exceeds K, there are no anchors although anchor_probability is above 0, or a pair has
                no target latent and the options need it.
        """
        # Steps are sampled before the anchor, so that runs with and without anchors use the same gradient steps.
        selected = self._draw_steps(inputs)
        if self.draw_anchor(inputs):
            return self.anchor_batch(inputs, selected, self.loss)
        teaching = Teaching(self.loss, self.states, self.regression_target)
        stats = distill(inputs, Sides.of_pairs(inputs), selected, teaching)
        target = TEACHER if self.regression_target == "teacher" else IMAGE
        return ObjectiveOutput.of(stats, target, weights=selected)

    def _draw_steps(self, inputs: ObjectiveInputs) -> Mapping[int, float]:
        """The gradient steps with their weights."""
        num_steps = len(inputs.sigmas) - 1
        if self.grad_steps is None:
            return every_step(num_steps)
        if self.grad_steps > num_steps:
            raise ValueError(f"grad_steps is {self.grad_steps}, but the rollout has only {num_steps} steps; lower it")
        if self.step_draw == "gap" and len(inputs.step_losses) == num_steps:
            return draw_by_gap(self.grad_steps, inputs.step_losses, inputs.generator)
        return draw_evenly(self.grad_steps, num_steps, inputs.generator)
