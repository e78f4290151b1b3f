"""The gap to the teacher of a LoRA, without any weights of a metric: what training minimises, on prompts of choice.

The student, with the LoRA, reads the prompt; the teacher, the untouched model, also sees a training image. Both predict
from the states that the student visits (arXiv 2605.05204, Eq. 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from torch import Tensor

from ..rollout import PredictX0, RolloutStep, rollout
from .evaluation import Measured


def visited(student: PredictX0, noise: Tensor, sigmas: Sequence[float]) -> list[RolloutStep]:
    """The student's few steps from noise [1, C, h, w], on the CPU."""
    return [
        RolloutStep(step.index, step.sigma, step.sigma_next, step.x.cpu(), step.x0.cpu())
        for step in rollout(student, noise, sigmas)
    ]


def gap_of(steps: Sequence[RolloutStep], teacher: PredictX0) -> float:
    """Mean square difference of the teacher's prediction to the student's, over the steps."""
    return mean(float((teacher(step.x, step.sigma).cpu() - step.x0).square().mean()) for step in steps)


def gap_measured(
    prompts: Sequence[str],
    untouched: Sequence[float],
    other_noise: Sequence[float],
    strengths: Mapping[float, Sequence[float]],
    title: str,
) -> Measured:
    """The gaps of `gap_of` over the untouched model's mean gap: 1 before training, 0 where it is closed."""
    unit = mean(untouched) or 1.0

    def relative(gaps: Sequence[float]) -> tuple[float, ...]:
        return tuple(gap / unit for gap in gaps)

    return Measured(
        name="teacher_gap", title=title, group="concept", better="lower", prompts=tuple(prompts),
        untouched=relative(untouched), other_noise=relative(other_noise),
        strengths={strength: relative(gaps) for strength, gaps in strengths.items()},
    )  # fmt: skip
