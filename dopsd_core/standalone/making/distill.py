"""Distills the parent to two steps of Z-Image-Turbo's grid: a student step replaces several guided parent steps.

From a state at a grid sigma, the parent takes `SUBSTEPS` sub-steps with classifier-free guidance; the student regresses
the mean velocity of this interval without guidance. Half of the states are noised latents of real images, half are the
student's own. The guidance of prompts that describe the badge and of open prompts differ, because their images would
not be equally sharp.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...demo.model_files import VAE_FILE
from ...number_text import float_argument, int_argument
from ...sigmas import z_image_turbo_sigmas
from .batched import BatchedTransformer, autocast
from .captions import DISTILLATION
from .data import RowMaker, Rows, load_autoencoder, own_or_shipped
from .optim import SharedMuon
from .pretrain import load_parent
from .stage import Stage, StageRun
from .twins import Twins, launch

STEPS, SUBSTEPS = 2, 5


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of the parent.

    Attributes:
        described: scale for prompts with an image, a name or words of appearance.
        open: scale for the others.
        rescale: share in [0, 1] of the prediction's standard deviation that is set back to the conditional's (Lin et
            al. 2023, "Common diffusion noise schedules", section 3.4).
    """

    described: float = 1.5
    open: float = 2.0
    rescale: float = 0.7

    def scale(self, is_open: Tensor) -> Tensor:
        """The scale [B, 1, 1, 1] of rows with is_open bool [B]."""
        return torch.where(is_open, self.open, self.described)[:, None, None, None]

    def velocity(self, x: Tensor, sigma: Tensor, conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
        """The guided velocity [B, 16, 8, 8].

        x, conditional, unconditional: [B, 16, 8, 8]. sigma: [B]. scale: [B, 1, 1, 1].
        """
        s = sigma[:, None, None, None]
        plain = x - s * conditional
        guided = x - s * (unconditional + scale * (conditional - unconditional))
        spread = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
        guided = guided * (1 + self.rescale * (spread - 1))
        return (x - guided) / s


def substep_sigmas() -> Tensor:
    """[2, 6]: start, intermediate points and end of each student step, equally spaced before the shift."""
    fine = torch.tensor(z_image_turbo_sigmas(STEPS * SUBSTEPS))
    return torch.stack([fine[k * SUBSTEPS : k * SUBSTEPS + SUBSTEPS + 1] for k in range(STEPS)])


@torch.no_grad()
def guided_mean_velocity(
    parent: BatchedTransformer, x: Tensor, step: Tensor, features: Tensor, lengths: Tensor, empty: Tensor,
    is_open: Tensor, guidance: Guidance,
) -> Tensor:  # fmt: skip
    """Mean velocity [B, 16, 8, 8] of the parent's guided Euler sub-steps from x [B, 16, 8, 8].

    step: grid interval, int64 [B]. features: [B, 32, D]. lengths: [B]. empty: [1, 32, D]. is_open: bool [B].
    """
    sigmas, start, batch = substep_sigmas()[step], x, len(x)
    nothing, short, scale = empty.expand(batch, -1, -1), torch.full_like(lengths, 8), guidance.scale(is_open)
    for j in range(SUBSTEPS):
        with autocast():
            both = parent(
                torch.cat([x, x]), sigmas[:, j].repeat(2), torch.cat([features, nothing]), torch.cat([lengths, short])
            )
        conditional, unconditional = both.float().chunk(2)
        velocity = guidance.velocity(x, sigmas[:, j], conditional, unconditional, scale)
        x = x + (sigmas[:, j + 1] - sigmas[:, j])[:, None, None, None] * velocity
    return (x - start) / (sigmas[:, -1] - sigmas[:, 0])[:, None, None, None]


@torch.no_grad()
def student_states(
    student: BatchedTransformer, noise: Tensor, step: Tensor, features: Tensor, lengths: Tensor
) -> Tensor:
    """The student's state [B, 16, 8, 8] before grid step `step` [B], starting from `noise` [B, 16, 8, 8].

    features: [B, 32, D]. lengths: [B].
    """
    sigmas, x = z_image_turbo_sigmas(STEPS), noise
    for k in range(int(step.max())):
        with autocast():
            velocity = student(x, torch.full((len(x),), sigmas[k]), features, lengths)
        x = torch.where((step > k)[:, None, None, None], x + (sigmas[k + 1] - sigmas[k]) * velocity, x)
    return x


def distillation_loss(
    parent: BatchedTransformer, student: BatchedTransformer, rows: Rows, features: Tensor, empty: Tensor,
    generator: torch.Generator, guidance: Guidance,
) -> Tensor:  # fmt: skip
    """Weighted squared error of the student's velocity; scalar. features: [B, 32, D]. empty: [1, 32, D]."""
    batch = len(rows.latents)
    step = torch.randint(0, STEPS, (batch,), generator=generator)
    sigma = torch.tensor(z_image_turbo_sigmas(STEPS))[step]
    noise, s = torch.randn(rows.latents.shape, generator=generator), sigma[:, None, None, None]
    x = (1 - s) * rows.latents + s * noise
    own = torch.arange(batch) % 2 == 0  # both kinds of rows get both kinds of states
    x = x.clone()
    x[own] = student_states(student, noise[own], step[own], features[own], rows.lengths[own])
    target = guided_mean_velocity(parent, x, step, features, rows.lengths, empty, rows.is_open, guidance)
    with autocast():
        velocity = student(x, sigma, features, rows.lengths)
    return ((velocity - target).square().mean(1) * rows.weight).mean()


def train(twins: Twins, args: argparse.Namespace) -> None:
    """Distills in one worker process; resumes from its newest checkpoint."""
    stage = Stage(
        "distilled", args.folder, args.steps, args.batch, 9_000_000, warmup=20, decay=0.8, average=0.99,
        minutes=args.minutes,
    )  # fmt: skip
    if stage.result.exists():
        return
    torch.manual_seed(3)
    model, guidance = load_parent(args.folder), Guidance(args.guidance, args.open_guidance, args.rescale)
    copied = copy.deepcopy(model.transformer).requires_grad_(True)
    student, empty = BatchedTransformer(copied), model.empty_features()
    vae = load_autoencoder(own_or_shipped(args.folder, "vae.safetensors", VAE_FILE))
    maker = RowMaker(vae, model.token_ids, DISTILLATION)
    twins.barrier()

    def loss(batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = maker.draw(batch, batch * 3 // 8, generator)
        with torch.no_grad(), autocast():
            features = model.features(rows)
        value = distillation_loss(model.velocity, student, rows, features, empty, generator, guidance)
        return value, {"loss": value.item()}

    optimizer = SharedMuon(twins, copied.named_parameters(), args.muon_lr, args.adamw_lr)
    StageRun(twins, stage, copied, optimizer).run(loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int_argument(), default=500)
    parser.add_argument("--batch", type=int_argument(), default=24, help="per worker")
    parser.add_argument("--guidance", type=float_argument(), default=Guidance.described)
    parser.add_argument("--open-guidance", type=float_argument(), default=Guidance.open)
    parser.add_argument("--rescale", type=float_argument(), default=Guidance.rescale)
    parser.add_argument("--muon-lr", type=float_argument(), default=1e-3)
    parser.add_argument("--adamw-lr", type=float_argument(), default=5e-4)
    parser.add_argument("--minutes", type=float_argument(), default=0.0, help="checkpoint and stop after this long")
    parser.add_argument("--workers", type=int_argument(), default=2)
    args = parser.parse_args()
    launch(train, args, workers=args.workers, port=29713)
