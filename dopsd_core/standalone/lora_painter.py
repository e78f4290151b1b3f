"""Draws prompts with and without a LoRA, for the command evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning.encode import Condition, encode_texts
from ..denoiser import Denoiser
from ..metrics.protocol import Shot
from ..rollout import sample
from .hosts.demo import with_lora
from .hosts.model import DemoHostModel, HostModel

_DEMO_BATCH = 32


@dataclass(frozen=True, eq=False)
class LoraPainter:
    """Draws images of a model; `on_image` is called after some, with their number.

    Attributes:
        model: the model.
        denoiser: its network.
        conditions: features [L, D] of each prompt.
        lora: the LoRA file; None to draw without.
        steps: Euler steps.
        on_image: called with the number of images that were drawn.
    """

    model: HostModel
    denoiser: Denoiser
    conditions: Mapping[str, Condition]
    lora: Path | None
    steps: int
    on_image: Callable[[int], object] = lambda count: None

    @classmethod
    def of(
        cls, model: HostModel, prompts: Sequence[str], lora: Path | None, steps: int | None,
        on_image: Callable[[int], object] = lambda count: None,
    ) -> LoraPainter:  # fmt: skip
        """Encodes the prompts, then loads the network: memory may not hold both it and the text encoder."""
        distinct = list(dict.fromkeys(prompts))
        conditions = dict(zip(distinct, encode_texts(distinct, model.encoder, None), strict=True))
        return cls(model, model.denoiser, conditions, lora, steps or model.sample_steps, on_image)

    def draw(self, strength: float, shots: Sequence[Shot]) -> list[Tensor]:
        """One image [3, H, W] in [0, 1] per shot, with the LoRA at a strength; without it at 0."""
        applied = self.lora is not None and strength != 0
        batch = _DEMO_BATCH if isinstance(self.model, DemoHostModel) else 1
        images: dict[int, Tensor] = {}
        with with_lora(self.denoiser, self.lora, strength) if self.lora and applied else nullcontext():
            for size in dict.fromkeys((shot.width, shot.height) for shot in shots):
                places = [i for i, shot in enumerate(shots) if (shot.width, shot.height) == size]
                for start in range(0, len(places), batch):
                    some = places[start : start + batch]
                    images.update(zip(some, self._draw([shots[i] for i in some], *size), strict=True))
                    self.on_image(len(some))
        return [images[i] for i in range(len(shots))]

    def _draw(self, shots: Sequence[Shot], width: int, height: int) -> Tensor:
        family, device = self.model.family, self.denoiser.device
        shape = family.latent_shape(width, height)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(shot.seed)) for shot in shots]
        conditions = [self.conditions[shot.prompt].to(device) for shot in shots]
        sigmas = family.sigmas(self.steps, width, height)
        latents = sample(self.denoiser, conditions, torch.stack(noise).to(device), sigmas)
        return self.model.encoder.decode(latents).float().cpu()
