"""Preview sheets of runs on small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dopsd_core.denoiser import Denoiser
from dopsd_core.families import Z_IMAGE
from dopsd_core.standalone.previews import Painter, TrainingPreview
from dopsd_core.trainable import Trainable
from dopsd_core.training.trainer import NoCallbacks
from dopsd_core.training.world import Peers
from tests.tiny import killable_data


class SmallModel:
    """What a painter needs of a model; its latents have four channels, of which three are the image.

    Attributes:
        drawn: the images that were decoded here.
    """

    family = Z_IMAGE

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.encoder, self.drawn = denoiser, self, 0

    def decode(self, latents: Tensor) -> Tensor:
        self.drawn += len(latents)
        return latents[:, :3].sigmoid()


class Draws(NoCallbacks):
    """Draws previews of the first prompts of `killable_data` into the folder of the run.

    Attributes:
        model: of these processes.
    """

    def __init__(self, folder: Path, denoiser: Any, world: Any, prompts: int = 3, in_parts: bool = False) -> None:
        self.model, peers = SmallModel(denoiser), Peers(world)
        if in_parts:
            peers.run_in_step()
        shown = killable_data().pairs[:prompts]
        painter = Painter(self.model, 2, seed=5)  # type: ignore[arg-type]
        self.preview = TrainingPreview(painter, shown, folder, peers=peers)

    def on_preview(self, step: int, adapters: Trainable) -> None:
        self.preview.write(step, adapters)
