"""Sharpens the distilled model where a prompt has many answers: an adversarial stage after the distillation.

A regression averages what it cannot tell apart; the distilled model's two steps on a prompt without a word of
appearance stay soft. Here a discriminator learns to tell the latents that the student draws in its own few steps from
those of real renders (hinge loss, Lim and Ye 2017, "Geometric GAN"), and the student learns against it. On the whole
mixture of prompts the student is held to the velocities of the distilled model, on states that it visits itself. The
learning rate falls over the last 40 % of the steps; the result is the average of the weights.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ...demo.model_files import TEXT_WIDTH, VAE_FILE
from ...files.atomic import write_atomic
from ...number_text import float_argument, int_argument
from ...sigmas import z_image_turbo_sigmas
from .batched import BatchedTransformer, autocast
from .captions import DISTILLATION, Mixture
from .checkpoint import append_log
from .data import RowMaker, Rows, load_autoencoder, own_or_shipped
from .distill import STEPS, student_states
from .optim import zero_gradients
from .pretrain import Parent, load_parent, load_student
from .twins import Twins, WeightAverage, launch, warmup_stable_decay

MANY_ANSWERS = Mixture(words=0, words_and_name=0, some_words=0.25, open=0.75, name=0, name_and_words=0)


class Discriminator(nn.Module):
    """Two scores of latents [B, 16, 8, 8]: of small patches, and of the whole with its caption."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.local = nn.Sequential(_conv(16, width), nn.LeakyReLU(0.2), _conv(width, width), nn.LeakyReLU(0.2))
        self.patch = spectral_norm(nn.Conv2d(width, 1, 1))
        self.whole = nn.Sequential(
            _conv(width, 2 * width, 2), nn.LeakyReLU(0.2), _conv(2 * width, 2 * width, 2), nn.LeakyReLU(0.2),
            nn.Flatten(),
        )  # fmt: skip
        self.score = spectral_norm(nn.Linear(8 * width, 1))
        self.caption = spectral_norm(nn.Linear(TEXT_WIDTH, 8 * width))

    def forward(self, latents: Tensor, caption: Tensor) -> Tensor:
        """Scores [B, 2], positive for real renders. latents: [B, 16, 8, 8]. caption: mean features [B, D]."""
        local = self.local(latents)
        whole = self.whole(local)
        fits = (whole * self.caption(caption)).sum(1, keepdim=True) / whole.shape[1] ** 0.5
        return torch.cat([self.patch(local).mean((2, 3)), self.score(whole) + fits], 1)


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(inside, outside, 3, stride, padding=1))


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Hinge loss, scalar, of the scores [B, 2] of real and drawn latents."""
    return F.relu(1 - real).mean() + F.relu(1 + drawn).mean()


@dataclass(frozen=True, eq=False)
class Player:
    """A network that learns.

    Attributes:
        network: on this worker.
        optimizer: of all its parameters.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer

    @staticmethod
    def of(network: nn.Module, lr: float, weight_decay: float) -> Player:
        """With AdamW at the peak learning rate `lr`."""
        parameters = [*network.parameters()]
        return Player(network, torch.optim.AdamW(parameters, lr, (0.0, 0.99), weight_decay=weight_decay, fused=True))

    def step(self, twins: Twins, loss: Tensor, max_norm: float, factor: float = 1.0) -> None:
        """One update against `loss`, a scalar, with `factor` times the peak learning rate."""
        parameters = [*self.network.parameters()]
        zero_gradients(parameters)
        loss.backward()
        twins.average_gradients(parameters, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * factor
        self.optimizer.step()


@dataclass(frozen=True, eq=False)
class Game:
    """What a step needs.

    Attributes:
        parent: encodes the captions.
        distilled: the velocity that is kept.
        student: the velocity that learns.
        discriminator: judges what the student draws.
        keep_open: weight in [0, 1] of the distilled model's velocity on open prompts.
    """

    parent: Parent
    distilled: BatchedTransformer
    student: BatchedTransformer
    discriminator: Discriminator
    keep_open: float

    @torch.no_grad()
    def features(self, rows: Rows) -> Tensor:
        """Features [B, 32, D] of the rows' captions."""
        with autocast():
            return self.parent.features(rows).float()

    def draw(self, rows: Rows, features: Tensor, noise: Tensor) -> Tensor:
        """The student's latents [B, 16, 8, 8] from noise, with gradients through all its steps."""
        sigmas, x = z_image_turbo_sigmas(STEPS), noise
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            with autocast():
                velocity = self.student(x, torch.full((len(x),), sigma), features, rows.lengths)
            x = x + (after - sigma) * velocity
        return x

    def keep_loss(self, rows: Rows, generator: torch.Generator) -> Tensor:
        """Squared distance, scalar, of the student's velocity to the distilled model's, on the student's states."""
        features, batch = self.features(rows), len(rows.latents)
        step = torch.randint(0, STEPS, (batch,), generator=generator)
        noise = torch.randn(rows.latents.shape, generator=generator)
        x, sigma = student_states(self.student, noise, step, features, rows.lengths), z_image_turbo_sigmas(STEPS)
        at = torch.tensor(sigma)[step]
        with autocast():
            with torch.no_grad():
                target = self.distilled(x, at, features, rows.lengths)
            error = (self.student(x, at, features, rows.lengths) - target).square().mean((1, 2, 3))
        return (error * torch.where(rows.is_open, self.keep_open, 1.0)).mean()


def mean_features(features: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the tokens of each caption: [B, L, D], lengths [B] -> [B, D]."""
    here = torch.arange(features.shape[1])[None] < lengths[:, None]
    return (features * here[..., None]).sum(1) / lengths[:, None]


def train(twins: Twins, args: argparse.Namespace) -> None:
    """Sharpens in one worker process; a run that was stopped begins anew."""
    result = args.folder / "sharpened.safetensors"
    if result.exists():
        return
    torch.manual_seed(5)
    parent, distilled = load_parent(args.folder), load_student(args.folder)
    learned = copy.deepcopy(distilled).requires_grad_(True)
    game = Game(parent, BatchedTransformer(distilled), BatchedTransformer(learned), Discriminator(), args.keep_open)
    student = Player.of(learned, args.lr, 0.01)
    opponent = Player.of(game.discriminator, args.discriminator_lr, 0.0)
    average = WeightAverage([*learned.parameters()], 0.95)
    vae = load_autoencoder(own_or_shipped(args.folder, "vae.safetensors", VAE_FILE))
    open_rows, all_rows = (RowMaker(vae, parent.token_ids, mixture) for mixture in (MANY_ANSWERS, DISTILLATION))
    twins.barrier()
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(11_000_000 + step * twins.world + twins.rank)
        rows = open_rows.draw(args.batch, 0, generator)
        features = game.features(rows)
        caption = mean_features(features, rows.lengths)
        drawn = game.draw(rows, features, torch.randn(rows.latents.shape, generator=generator))
        scores = (game.discriminator(latents, caption) for latents in (rows.latents, drawn.detach()))
        hinge = discriminator_loss(*scores)
        opponent.step(twins, hinge, max_norm=10.0)
        figures = {"discriminator": hinge.item()}
        if step >= args.alone:
            adversarial = -game.discriminator(drawn, caption).mean()
            kept = game.keep_loss(all_rows.draw(args.batch, args.batch * 3 // 8, generator), generator)
            factor = warmup_stable_decay(step - args.alone, args.steps - args.alone, 20, 0.4)
            student.step(twins, args.weight * adversarial + kept, max_norm=1.0, factor=factor)
            average.update()
            figures |= {"adversarial": adversarial.item(), "kept": kept.item()}
        if twins.rank == 0 and (step + 1) % 20 == 0:
            append_log(args.folder, {"stage": "sharpened", "step": step + 1, "of": args.steps, **figures})
    average.swap()
    if twins.rank == 0:
        write_atomic(result, save({name: value.contiguous() for name, value in learned.state_dict().items()}))
    twins.barrier()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int_argument(), default=300)
    parser.add_argument("--alone", type=int_argument(), default=40, help="first steps, of the discriminator alone")
    parser.add_argument("--batch", type=int_argument(), default=24, help="per worker, of open and of all prompts")
    parser.add_argument("--lr", type=float_argument(), default=1e-4)
    parser.add_argument("--discriminator-lr", type=float_argument(), default=4e-4)
    parser.add_argument("--weight", type=float_argument(), default=0.05, help="of the discriminator in the loss")
    parser.add_argument("--keep-open", type=float_argument(), default=0.3, help="of the distilled velocity")
    parser.add_argument("--workers", type=int_argument(), default=2)
    args = parser.parse_args()
    launch(train, args, workers=args.workers, port=29717)
