"""The gradient of an optimizer step: all batches of all ranks, checked, unscaled and clipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..dtensors import whole
from ..objectives import ObjectiveInputs, ObjectiveOutput
from ..trainable import Trainable
from .batches import Batches
from .class_images import ClassImages
from .loss_scale import LossScale
from .nonfinite import NonFiniteError, remedy
from .world import Peers, Turn

log = logging.getLogger("dopsd")


@dataclass(frozen=True, eq=False)
class Gradients:
    """Adds up the gradients of a step.

    Attributes:
        config: the configuration.
        adapters: the trainable weights, which get the gradients.
        batches: the batches.
        class_images: the images that the untouched model drew.
        loss_scale: the factor of the losses in fp16.
        peers: the processes that share the batches.
    """

    config: TrainConfig
    adapters: Trainable
    batches: Batches
    class_images: ClassImages
    loss_scale: LossScale
    peers: Peers

    def accumulate(self, step: int, optimizer: torch.optim.Optimizer) -> tuple[list[ObjectiveOutput], float, int]:
        """Computes the clipped gradient of optimizer step `step`, from 0.

        Returns:
            (outputs of its batches, norm before clipping, number of repetitions on the same data and noise with a
            smaller loss scale).

        Raises:
            NonFiniteError: loss or gradient is not finite.
        """
        overflows = 0
        while True:
            optimizer.zero_grad(set_to_none=True)
            outputs = self._backward_all(step)
            grad_norm = self.check_and_clip(step, outputs)
            if math.isfinite(grad_norm):
                return outputs, grad_norm, overflows
            if not self.loss_scale.after_overflow():
                raise NonFiniteError(step + 1, "gradient", grad_norm, remedy=self._remedy(step))
            overflows += 1
            log.info("step %d: gradient overflow; repeating with loss scale %g", step + 1, self.loss_scale.value)

    def backward(self, step: int, turn: Turn) -> ObjectiveOutput:
        """Adds the gradients of one batch of a step."""
        return self.config.objective.backward(self._inputs(step, turn))

    def check_and_clip(self, step: int, outputs: Sequence[ObjectiveOutput]) -> float:
        """Unscales and clips the gradients; returns their norm before.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        for output in outputs:
            if not math.isfinite(output.loss):
                raise NonFiniteError(step + 1, "loss", output.loss, output.not_finite, self._remedy(step))
        parameters = self.adapters.parameters()
        self.loss_scale.unscale(p.grad for p in parameters if p.grad is not None)
        return float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf)))

    def _backward_all(self, step: int) -> list[ObjectiveOutput]:
        """The outputs of all batches of the step, each computed by one rank; adds up the gradients of all ranks."""
        turns = self.peers.share([self._course(step, micro) for micro in range(self.config.grad_accumulation)])
        every = self.peers.all(lambda: [(turn, self.backward(step, turn)) for turn in turns])
        self.peers.sum_gradients(self.adapters.parameters())
        outputs = {turn.number: output for found in every for turn, output in found if turn.counts}
        return [outputs[number] for number in sorted(outputs)]

    def _course(self, step: int, micro: int) -> Hashable:
        """Which forwards a batch makes, if ranks have to make the same ones together."""
        return self.config.objective.course(self._inputs(step, Turn(micro))) if self.adapters.is_sharded else ()

    def _inputs(self, step: int, turn: Turn) -> ObjectiveInputs:
        scale = self.loss_scale.value if turn.counts else 0.0
        return self.batches.inputs(step, turn.number, self.class_images.images, scale)

    def _remedy(self, step: int) -> str:
        return remedy(step, self.loss_scale.is_on)
