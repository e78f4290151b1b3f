"""The batches of a run: what an objective gets for each micro batch of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..conditioning.encode import Condition, DualCondition
from ..config import TrainConfig
from ..denoiser import Denoiser
from ..families import get_family
from ..lazy_sequence import Lazy
from ..objectives import ClassImage, ObjectiveInputs
from ..trainable import Trainable
from ..transfer import to_device
from .rng import DataOrder, draw_noise, draw_variant, make_generator
from .scales import ScaledOrder
from .step_losses import StepLosses
from .training_set import TrainingSet, latent_shape, pair_to


def on_device(conditions: Sequence[Condition], device: torch.device) -> Sequence[Condition]:
    """The conditions on a device; those that share their features [L, D], since they repeat, share them there too.

    Those that are read from disk one by one are moved one by one.
    """
    if isinstance(conditions, Lazy):
        return conditions.map(lambda condition: condition.to(device))
    keys = [tuple(map(id, (condition.features, *condition.reference_latents))) for condition in conditions]
    moved = {key: condition.to(device) for key, condition in dict(zip(keys, conditions, strict=True)).items()}
    return [moved[key] for key in keys]


@dataclass(frozen=True, eq=False)
class Batches:
    """Makes the micro batches; each is a function of (seed, step, micro).

    Attributes:
        config: the configuration.
        denoiser: the frozen network.
        adapters: the trainable weights.
        data: the training set.
        order: the examples of each batch.
        anchors: conditions without the trigger, on the denoiser's device.
    """

    config: TrainConfig
    denoiser: Denoiser
    adapters: Trainable
    data: TrainingSet
    order: DataOrder | ScaledOrder
    anchors: Sequence[Condition]

    @cached_property
    def step_losses(self) -> StepLosses:
        """The losses at each rollout step so far."""
        return StepLosses(self.config.rollout_steps)

    def inputs(self, step: int, micro: int, class_images: Sequence[ClassImage], loss_scale: float) -> ObjectiveInputs:
        """The inputs for micro batch `micro` of optimizer step `step`; loss_scale: factor of the losses for fp16."""
        config, device = self.config, self.denoiser.device
        first = micro * config.batch_size
        indices = self.order.batch(step * config.grad_accumulation + micro)
        pairs = [self._draw_pair(index, step, first + offset) for offset, index in enumerate(indices)]
        shapes = [latent_shape(pair) for pair in pairs]
        return ObjectiveInputs(
            denoiser=self.denoiser,
            adapters=self.adapters,
            pairs=[pair_to(pair, device) for pair in pairs],
            noise=to_device(draw_noise(config.seed, step, first, shapes), device),
            sigmas=get_family(config.family).grid(config.rollout_steps, shapes[0]),
            generator=make_generator(config.seed, "objective", step, micro),
            anchors=self.anchors,
            class_images=class_images,
            loss_scale=loss_scale / config.grad_accumulation,
            step_losses=self.step_losses.known,
        )

    def _draw_pair(self, index: int, step: int, sample: int) -> DualCondition:
        config = self.config
        example = self.data.examples[index]
        return self.data.pairs[draw_variant(example, config.caption_dropout, config.seed, step, sample)]
