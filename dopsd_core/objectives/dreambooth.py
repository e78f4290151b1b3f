"""DreamBooth (arXiv 2208.12242): supervised fine-tuning with prior preservation on the untouched model's own images.

Before training, the untouched model draws images of ordinary prompts, the anchor captions, in its own few steps
(`training/class_images.py`), unless there are regularisation images. Each step regresses the training images and, with
a weight, as many of these.

Legend: B batch, C latent channels, h w latent size; `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ..lazy import lazy
from ..options import Hint
from ..transfer import to_device
from .base import ClassImage, ObjectiveInputs, ObjectiveOutput, draw
from .distillation import IMAGE
from .flow_matching import FlowMatching, regress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


class DreamBooth(FlowMatching):
    """Flow matching on the targets, plus prior_weight times flow matching on images of the untouched model."""

    name: ClassVar[str] = "dreambooth"
    summary: ClassVar[str] = "ordinary fine-tuning that also trains on images which the untouched model draws first"
    prefix: ClassVar[str] = "dreambooth_"
    relative_cost: ClassVar[float] = 0.7
    takes_regularisation: ClassVar[bool] = True

    prior_weight: Annotated[float, Hint(step=0.1, most=100.0)] = Field(
        default=1.0, gt=0, description="weight of the loss on the class images"
    )
    class_images: Annotated[int, Hint(most=1000)] = Field(
        default=100,
        ge=1,
        description="number of class images, which the untouched model draws from the anchor captions before training",
    )

    @property
    def drawn_images(self) -> int:
        """The number of class images."""
        return self.class_images

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One backward per training image and one per class image, each at its own sigma with its own noise.

        Raises:
            ValueError: a pair has no target latent, or there are no class images.
        """
        if not inputs.class_images:
            raise ValueError("dreambooth needs class images; train with anchor captions to draw them from")
        output = ObjectiveOutput.of(self.regress_pairs(inputs), IMAGE)
        drawn = draw(inputs.class_images, len(inputs.pairs), inputs.generator)
        prior = torch.stack([self._regress_prior(inputs, image) for image in drawn]).mean().item()
        metrics: Mapping[str, float] = {**output.metrics, "concept_loss": output.loss, "prior_loss": prior}
        return replace(output, loss=output.loss + self.prior_weight * prior, metrics=metrics)

    def _regress_prior(self, inputs: ObjectiveInputs, drawn: ClassImage) -> Tensor:
        """The loss on a class image, a scalar."""
        sigma = self.draw_sigma(inputs.sigmas, inputs.generator)
        noise = torch.randn(drawn.latent.shape, generator=inputs.generator)
        device = inputs.noise.device
        target, noise = (to_device(latent, device, torch.float32)[None] for latent in (drawn.latent, noise))
        weight = self.prior_weight * inputs.loss_scale / len(inputs.pairs)
        return regress(inputs, drawn.condition.to(device), target, noise, sigma, weight)[0]
