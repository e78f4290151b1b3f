"""All weights of small networks of the real families, trained in one process or by ranks that hold a part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.config import TrainConfig
from dopsd_core.training.trainer import TrainingSet, train
from tests import model_folders, own_tower_folders
from tests import qwen_image21_twins as twins
from tests.sharded_runs import Rank
from tests.tiny import make_config

STEPS = 3


@dataclass(frozen=True)
class Kind:
    """A family's small network.

    Attributes:
        network: makes it.
        channels: of a latent.
        width: of a text's features.
        slots: places of the teacher's reference; None if the teacher only has a longer text.
    """

    network: Callable[[], Any]
    channels: int
    width: int
    slots: tuple[int, ...] | None = None


KINDS = {
    "flux2_klein": Kind(model_folders.klein_transformer, 128, 3 * model_folders.TEXT_WIDTH, ()),
    "krea2": Kind(own_tower_folders.krea2_transformer, 16, 12 * own_tower_folders.KREA_WIDTH),
    "qwen_image21": Kind(twins.transformer, 64, twins.TEXT_WIDTH, (2,)),
}


def training(family: str, folder: Path, world: Any = None) -> None:
    """Three steps of D-OPSD with an EMA teacher; some batches are prior anchors."""
    from dopsd_core.standalone.hosts.model import DIFFUSERS_FAMILIES

    torch.set_num_threads(1)
    denoiser = DIFFUSERS_FAMILIES[family]().denoiser(KINDS[family].network())
    train(_config(family), denoiser, _data(KINDS[family]), folder, world=world)


class Networks(Rank):
    """Trains the networks of all families, one after another, as one process of several."""

    def work(self, world: Any, rank: int) -> None:
        for family in KINDS:
            training(family, self.folder / family, world)


def _config(family: str) -> TrainConfig:
    return make_config(
        family=family, steps=STEPS, adapter="full", rollout_steps=2, grad_accumulation=4, anchor_probability=0.4,
        probe_every=STEPS, checkpoint_every=STEPS, lr=1e-3,
    )  # fmt: skip


def _data(kind: Kind) -> TrainingSet:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def pair(number: int) -> DualCondition:
        teacher = Condition(normal(7, kind.width))
        if kind.slots is not None:
            teacher = Condition(teacher.features, (normal(kind.channels, 2, 4),), kind.slots)
        student = Condition(normal(4 + number % 2, kind.width))
        return DualCondition(student, teacher, normal(kind.channels, 4, 2 + 2 * (number % 2)), f"{number}", f"{number}")

    return TrainingSet([pair(number) for number in range(4)], [Condition(normal(5, kind.width)) for _ in range(2)])
