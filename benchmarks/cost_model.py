"""Formulas for the FLOPs of an optimizer step; explained in docs/cost.md, verified by tests/test_cost_model.py."""

from __future__ import annotations

from dataclasses import dataclass

from dopsd_core.adapters import Lora
from dopsd_core.denoiser import Denoiser, LinearSite
from dopsd_core.families import Family
from dopsd_core.memory.activation_checkpointing import block_products, block_shapes, tokens_of
from dopsd_core.memory.checkpoint_plan import BlockBytes, Checkpointing

FUSED_ATTENTION_BACKWARD = 2.5
"""Matrix products of attention's backward over those of its forward: 5 against 2, as scores are computed again."""
WRITTEN_OUT_ATTENTION_BACKWARD = 2.0


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one pass over one sample; a multiply-add is two.

    Attributes:
        linears: the frozen Linears.
        attention: scores and values.
        lora: A and B.
        blocks: of each block that a gradient reaches what gradient checkpointing repeats; their bytes are left out.
        early: (Linears, attention) of the blocks before the first adapted one, which no gradient reaches.
    """

    linears: float
    attention: float
    lora: float
    blocks: tuple[BlockBytes, ...]
    early: tuple[float, float] = (0.0, 0.0)

    def forward(self, with_lora: bool = True) -> float:
        """One forward."""
        return self.linears + self.attention + (self.lora if with_lora else 0.0)

    def backward(self, attention_factor: float = FUSED_ATTENTION_BACKWARD) -> float:
        """g @ W of each frozen Linear (no weight gradient), attention's, and twice the LoRA: its inputs and weights."""
        linears, attention = self.early
        return self.linears - linears + attention_factor * (self.attention - attention) + 2 * self.lora

    def recompute(self, checkpointing: Checkpointing | int) -> float:
        """What of the forward of the checkpointed blocks is repeated."""
        return Checkpointing.of(checkpointing).flops(self.blocks)


def pass_cost(denoiser: Denoiser, family: Family, lora: Lora, tokens: tuple[int, int]) -> PassCost:
    """From the widths of the Linears and the (image, text) tokens, `Family.tokens`."""
    image, text = tokens
    sites = denoiser.sites()
    names = lora.chosen(sites)
    shapes = block_shapes(denoiser.blocks(), sites, family, image, text)
    inside = {site.name for _, members in shapes for site in members}
    outside = [site for site in sites if site.name not in inside]
    linears = sum(2.0 * _tokens(s, image, text, image) * s.in_features * s.out_features for s in outside)
    attention = adapters = 0.0
    early = (0.0, 0.0)
    blocks = []
    for shape, members in shapes:
        *products, scores = block_products(shape, members, image)
        own = sum(product.flops for product in products)
        low_rank = sum(
            2.0 * tokens_of(site, shape, image) * lora.rank * (site.in_features + part.out_features)
            for site in members
            for part in site.parts
            if part.name in names
        )
        linears, attention, adapters = linears + own, attention + scores.flops, adapters + low_rank
        if adapters == 0:
            early = (early[0] + own, early[1] + scores.flops)
            blocks.append(BlockBytes(0, 0))
        else:
            blocks.append(BlockBytes(0, 0, (*products, scores), low_rank))
    return PassCost(linears, attention, adapters, tuple(blocks), early)


_OF_TEXT = (
    "cap_embedder",
    "context_embedder",
    "txt_in",
    "txtmlp",
    "projector",
)
_OF_TIME = ("adaLN", "modulation", "t_embedder", "time_", "tmlp", "tproj", "norm_out")


def _tokens(site: LinearSite, image: int, text: int, whole: int) -> int:
    """How many tokens a Linear outside the blocks works on, by its name: those of the text, one (the time), or all."""
    name = site.parts[0].name
    if any(word in name for word in _OF_TEXT):
        return text
    if any(word in name for word in _OF_TIME):
        return 1
    return whole


@dataclass(frozen=True)
class StepCost:
    """An optimizer step on one sample.

    Attributes:
        student: a pass of the student.
        teacher: a pass of the teacher.
        rollout_steps: K.
        grad_steps: how many of the K are backpropagated through.
        checkpointing: gradient checkpointing; a number is that of blocks that keep their inputs alone.
        teacher_has_lora: the EMA teacher; a frozen one is the base only.
        attention_factor: FLOPs of attention's backward over those of its forward.
    """

    student: PassCost
    teacher: PassCost
    rollout_steps: int = 4
    grad_steps: int = 4
    checkpointing: Checkpointing | int = 0
    teacher_has_lora: bool = True
    attention_factor: float = FUSED_ATTENTION_BACKWARD

    @property
    def model_flops(self) -> float:
        """FLOPs of the step without gradient checkpointing."""
        m, k = self.grad_steps, self.rollout_steps
        forwards = m * (k + 1) / (m + 1)  # on average: the rollout ends with the last gradient step
        teacher = self.teacher.forward(self.teacher_has_lora)
        return forwards * self.student.forward() + m * (teacher + self.student.backward(self.attention_factor))

    @property
    def flops(self) -> float:
        """What is computed."""
        return self.model_flops + self.grad_steps * self.student.recompute(self.checkpointing)

    @property
    def repeated(self) -> float:
        """What gradient checkpointing repeats, over the FLOPs of the step without it."""
        return self.flops / self.model_flops - 1

    @property
    def forward_equivalents(self) -> float:
        """In forwards of the student."""
        return self.flops / self.student.forward()
