"""Training objectives: each turns a micro batch into accumulated gradients, one rollout step at a time.

D-OPSD (arXiv 2605.05204, Eq. 7): on the student's own states x_k, the student under the caption regresses its teacher
under caption and image, L = mean_k mean((v_student - sg(v_teacher))^2). States are detached, so L is a sum of
independent graphs: backward after each step gives the gradient of one backward over all K and holds the activations
of one.

Legend: B batch, C latent channels, h w latent size, K rollout steps; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters.adapter_set import AdapterSet, Mode
from .conditioning.encode import Condition, DualCondition
from .denoiser import Denoiser
from .rollout import PredictX0, RolloutStep, rollout
from .sigmas import shift_sigma
from .transfer import to_device

LossForm = Literal["x0", "velocity"]
SigmaDistribution = Literal["logit-normal", "uniform", "grid"]

_MIN_SIGMA = 1e-3
_TEACHER = "the teacher's prediction"


@dataclass(frozen=True, eq=False)
class ObjectiveInputs:
    """One micro batch. All randomness of the objective comes from `generator` (CPU), `noise` aside.

    pairs: B, of one latent shape. noise: [B, C, h, w] fp32 on the denoiser's device. sigmas: the grid, K + 1 values.
    anchors: conditions without the trigger to draw from. loss_scale: what losses are multiplied by before their
    backward: 1 / gradient accumulation, and in fp16 the factor of `loss_scale.py`.
    """

    denoiser: Denoiser
    adapters: AdapterSet
    pairs: Sequence[DualCondition]
    noise: Tensor
    sigmas: Sequence[float]
    generator: torch.Generator
    anchors: Sequence[Condition] = ()
    loss_scale: float = 1.0


@dataclass(frozen=True)
class StepStats:
    """Student against target on one state. gap: rms distance of the velocities. cosine, norm_ratio (student over
    target), student_norm, target_norm of the velocities: means over the batch. loss: of this state, unscaled."""

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
    """loss: mean over `steps`, unscaled. target: what the student was compared with, for messages. is_anchor: the batch
    was a prior anchor; its gap is not one to the teacher."""

    loss: float
    steps: tuple[StepStats, ...]
    target: str
    is_anchor: bool = False

    @property
    def gap(self) -> float:
        """Mean gap over the states."""
        return _mean([s.gap for s in self.steps])

    @property
    def cosine(self) -> float:
        """Mean cosine over the states."""
        return _mean([s.cosine for s in self.steps])

    @property
    def norm_ratio(self) -> float:
        """Mean norm ratio over the states."""
        return _mean([s.norm_ratio for s in self.steps])

    @property
    def not_finite(self) -> str:
        """Which prediction was the first to be infinite or NaN, and where; "" if none was."""
        for s in self.steps:
            norms = (("the student's prediction", s.student_norm), (self.target, s.target_norm))
            if names := [name for name, norm in norms if not math.isfinite(norm)]:
                return f"{' and '.join(names)} at sigma {s.sigma:.3g}"
        return ""


class Objective(Protocol):
    """Owns the maths of a step; the trainer owns its order (clip, optimizer, teacher update)."""

    @property
    def name(self) -> str:
        """Its name in `OBJECTIVES` and in a LoRA's metadata."""
        ...

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Adds loss_scale * dL/dtheta to the gradients of `inputs.adapters.parameters()`; the mode stays as it was."""
        ...


def self_distillation_loss(x0_student: Tensor, x0_teacher: Tensor, sigma: float, form: LossForm = "x0") -> Tensor:
    """Eq. 7 on one state: mean squared difference of x0 (default) or velocities; scalar. velocity = x0 form / sigma^2.

    x0_student [B, C, h, w] carries the graph, x0_teacher [B, C, h, w] is taken as a constant. sigma in (0, 1].
    """
    if form not in get_args(LossForm):
        raise ValueError(f"loss form must be one of {', '.join(get_args(LossForm))}; got {form!r}")
    loss = F.mse_loss(x0_student, x0_teacher.detach())
    return loss / sigma**2 if form == "velocity" else loss


@dataclass(frozen=True, kw_only=True)
class DOPSD:
    """Self-distillation on the student's rollout.

    grad_steps: take loss and gradient on so many of the K steps, drawn at random, scaled K / m: unbiased, cheaper,
    noisier; None for all. anchor_probability: with this chance a batch is a prior anchor: captions without the
    trigger, the student's own rollout, and the frozen base under the SAME text as teacher.
    """

    grad_steps: int | None = None
    loss: LossForm = "x0"
    anchor_probability: float = 0.0
    name: str = field(default="dopsd", init=False)

    def __post_init__(self) -> None:
        if self.loss not in get_args(LossForm):
            raise ValueError(f"loss must be one of {', '.join(get_args(LossForm))}; got {self.loss!r}")
        if self.grad_steps is not None and self.grad_steps < 1:
            raise ValueError(f"grad_steps must be at least 1, or None for all steps; got {self.grad_steps}")
        if not 0.0 <= self.anchor_probability <= 1.0:
            raise ValueError(f"anchor_probability must be within [0, 1], got {self.anchor_probability}")

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One rollout from `inputs.noise`; backward after each gradient step.

        Raises:
            ValueError: grad_steps exceeds K, or anchors are asked for and there are none.
        """
        # Steps before anchor: a run with anchors takes its gradient on the same steps as one without.
        selected = self._draw_steps(inputs)
        is_anchor = self._draw_anchor(inputs)
        if is_anchor:
            student = teacher = _draw_conditions(inputs)
            teacher_mode: Mode = "off"
        else:
            student, teacher = [p.student for p in inputs.pairs], [p.teacher for p in inputs.pairs]
            teacher_mode = "teacher"
        stats = []
        steps = rollout(_predictor(inputs, "student", student), inputs.noise, inputs.sigmas, grad_steps=selected)
        for step in steps:
            if step.index in selected:
                x0_teacher = _predict(inputs, teacher_mode, teacher, step.x, step.sigma)
                loss = self_distillation_loss(step.x0, x0_teacher, step.sigma, self.loss)
                # A checkpointed block recomputes its forward here: with the student's weights.
                with inputs.adapters.use("student"):
                    (loss * (inputs.loss_scale / len(selected))).backward()
                stats.append((step.index, step.sigma, _compare(step, x0_teacher, loss)))
            if step.index == max(selected):
                break
        return _output(stats, "the untouched model's prediction" if is_anchor else _TEACHER, is_anchor)

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


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised flow matching on the target: noise its latent at a random sigma per sample, regress noise - x0.

    sigmas: "logit-normal" (sigmoid of a unit normal) and "uniform" are moved towards noise by `shift`; "grid" draws
    from the model's own few-step grid.
    """

    sigmas: SigmaDistribution = "logit-normal"
    shift: float = 3.0
    name: str = field(default="sft", init=False)

    def __post_init__(self) -> None:
        if self.sigmas not in get_args(SigmaDistribution):
            raise ValueError(f"sigmas must be one of {', '.join(get_args(SigmaDistribution))}; got {self.sigmas!r}")
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}; use 1 for none")

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Backward per sample, each at its own sigma; `inputs.noise` is the noise that is added.

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
            stats.append((index, sigma, _compare(RolloutStep(index, sigma, 0.0, x, x0), target, loss)))
        return _output(stats, "the target latent")

    def draw_sigma(self, grid: Sequence[float], generator: torch.Generator) -> float:
        """One sigma in (0, 1]; `grid` is used by "grid" only, without its final 0."""
        if self.sigmas == "grid":
            return grid[int(torch.randint(len(grid) - 1, (), generator=generator).item())]
        if self.sigmas == "uniform":
            u = torch.rand((), generator=generator).item()
        else:
            u = torch.randn((), generator=generator).sigmoid().item()
        return max(shift_sigma(u, self.shift), _MIN_SIGMA)


@torch.no_grad()
def measure_gap(
    inputs: ObjectiveInputs, form: LossForm = "x0", student_mode: Mode = "student", teacher_mode: Mode = "teacher"
) -> ObjectiveOutput:
    """Distance to the teacher along the student's rollout, no gradients: for held-out pairs, and before training."""
    student, teacher = [p.student for p in inputs.pairs], [p.teacher for p in inputs.pairs]
    stats = []
    for step in rollout(_predictor(inputs, student_mode, student), inputs.noise, inputs.sigmas):
        x0_teacher = _predict(inputs, teacher_mode, teacher, step.x, step.sigma)
        loss = self_distillation_loss(step.x0, x0_teacher, step.sigma, form)
        stats.append((step.index, step.sigma, _compare(step, x0_teacher, loss)))
    return _output(stats, _TEACHER)


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"dopsd": DOPSD, "sft": SFT}
"""Name -> class; the fields of each class are its options."""


# -- helpers ----------------------------------------------------------------------------------------------------------


def _predictor(inputs: ObjectiveInputs, mode: Mode, conditions: Sequence[Condition]) -> PredictX0:
    def predict(x: Tensor, sigma: float) -> Tensor:
        with inputs.adapters.use(mode):
            return inputs.denoiser.predict_x0(x, sigma, conditions)

    return predict


@torch.no_grad()
def _predict(inputs: ObjectiveInputs, mode: Mode, conditions: Sequence[Condition], x: Tensor, sigma: float) -> Tensor:
    return _predictor(inputs, mode, conditions)(x, sigma).float()


def _draw_conditions(inputs: ObjectiveInputs) -> list[Condition]:
    chosen = torch.randint(len(inputs.anchors), (len(inputs.pairs),), generator=inputs.generator)
    return [inputs.anchors[i] for i in chosen.tolist()]


@torch.no_grad()
def _compare(step: RolloutStep, x0_target: Tensor, loss: Tensor) -> Tensor:
    """The figures of `StepStats` from loss on, on the device: read back once per batch, not once per step."""
    v_student = ((step.x - step.x0.detach()) / step.sigma).flatten(1)
    v_target = ((step.x - x0_target) / step.sigma).flatten(1)
    gap = (v_student - v_target).square().mean().sqrt()
    cosine = F.cosine_similarity(v_student, v_target, dim=1).mean()
    norms = v_student.norm(dim=1), v_target.norm(dim=1)
    ratio = (norms[0] / norms[1].clamp_min(1e-12)).mean()
    return torch.stack([loss.detach(), gap, cosine, ratio, norms[0].mean(), norms[1].mean()])


def _output(stats: Sequence[tuple[int, float, Tensor]], target: str, is_anchor: bool = False) -> ObjectiveOutput:
    rows = torch.stack([values for _, _, values in stats]).tolist()
    steps = tuple(StepStats(index, sigma, *row) for (index, sigma, _), row in zip(stats, rows, strict=True))
    return ObjectiveOutput(_mean([s.loss for s in steps]), steps, target, is_anchor)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
