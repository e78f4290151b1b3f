"""Prior anchors: some batches pull the student to the untouched network on ordinary prompts, against leakage."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..lazy import lazy
from .base import Objective, ObjectiveInputs, ObjectiveOutput, missing_anchors
from .distillation import UNTOUCHED, LossForm, Sides, Teaching, distill
from .step_draws import weights_of

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self
else:
    torch = lazy("torch")


class WithPriorAnchors(Objective):
    """An objective whose option `anchor_probability`, which it declares, is the share of prior anchors."""

    if TYPE_CHECKING:
        anchor_probability: float

    @property
    def anchor_share(self) -> float:
        """The share of batches that are prior anchors."""
        return self.anchor_probability

    def without_anchors(self) -> Self:
        """The same objective without prior anchors."""
        return self.replace(anchor_probability=0.0)

    def draw_anchor(self, inputs: ObjectiveInputs) -> bool:
        """Whether this batch is a prior anchor; draws from the generator.

        Raises:
            ValueError: the probability is above 0, but there are no anchors.
        """
        if self.anchor_probability > 0 and not inputs.anchors:
            raise ValueError(missing_anchors(self))
        return torch.rand((), generator=inputs.generator).item() < self.anchor_probability

    def anchor_batch(
        self, inputs: ObjectiveInputs, selected: Collection[int], form: LossForm = "x0"
    ) -> ObjectiveOutput:
        """On its own trajectory of ordinary prompts, the student is pulled to the untouched network.

        Args:
            selected: indices of the rollout's steps with a backward.
        """
        stats = distill(inputs, Sides.of_anchors(inputs), selected, Teaching(form))
        return ObjectiveOutput.of(stats, UNTOUCHED, is_anchor=True, weights=weights_of(selected))
