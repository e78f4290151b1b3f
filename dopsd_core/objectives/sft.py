"""Supervised fine-tuning by flow matching on the target images: a baseline for D-OPSD, and the way to train an
undistilled model whose LoRA is used on the distilled one.

Legend: B batch, C latent channels, h w latent size; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, ClassVar

from pydantic import Field

from ..options import Hint
from .base import ObjectiveInputs, ObjectiveOutput
from .distillation import IMAGE
from .flow_matching import FlowMatching
from .prior_anchors import WithPriorAnchors


class SFT(FlowMatching, WithPriorAnchors):
    """Flow matching on the target latent: x = (1 - sigma) x0 + sigma noise at a random sigma, regress noise - x0."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "ordinary fine-tuning on the images, as a baseline or for an undistilled model"
    prefix: ClassVar[str] = "sft_"
    relative_cost: ClassVar[float] = 0.35
    needs_few_steps: ClassVar[bool] = False

    anchor_probability: Annotated[float, Hint(step=0.05)] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of batches that are prior anchors, as for dopsd: the model's own few steps on ordinary "
        "prompts, with the untouched network as teacher",
    )

    @property
    def uses_rollout(self) -> bool:
        """Whether there are prior anchors or sigmas on the grid."""
        return self.anchor_probability > 0 or super().uses_rollout

    def course(self, inputs: ObjectiveInputs) -> Hashable:
        """Whether it is an anchor."""
        return self.anchor_probability > 0 and self.draw_anchor(inputs)

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One backward per sample, each at its own sigma, with `inputs.noise`; or a prior anchor along the rollout.

        Raises:
            ValueError: a pair has no target latent, or there are no anchors although anchor_probability is above 0.
        """
        if self.anchor_probability > 0 and self.draw_anchor(inputs):
            return self.anchor_batch(inputs, range(len(inputs.sigmas) - 1))
        return ObjectiveOutput.of(self.regress_pairs(inputs), IMAGE)
