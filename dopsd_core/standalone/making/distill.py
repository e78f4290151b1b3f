"""Distills the parent to Z-Image-Turbo's four steps: one student step replaces several guided steps of the parent.

From a state at a grid sigma, the parent takes three sub-steps with classifier-free guidance; the student regresses the
mean velocity of this interval without guidance. Half of the states are noised latents of real images, half are the
student's own.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import Tensor

from ...sigmas import z_image_turbo_sigmas
from .batched import BatchedTransformer
from .data import DISTILLATION, RowMaker, Rows, make_bank
from .optim import SharedMuon, zero_gradients
from .pretrain import load_parent
from .twins import Twins, WeightAverage, launch, load_state, save_state, warmup_stable_decay

STEPS, SUBSTEPS = 4, 3


def substep_sigmas() -> Tensor:
    """[4, 4]: start, two intermediate points and end of each student step, equally spaced before the shift."""
    fine = torch.tensor(z_image_turbo_sigmas(STEPS * SUBSTEPS))
    return torch.stack([fine[k * SUBSTEPS : k * SUBSTEPS + SUBSTEPS + 1] for k in range(STEPS)])


@torch.no_grad()
def guided_mean_velocity(
    parent: BatchedTransformer,
    x: Tensor,
    step: Tensor,
    features: Tensor,
    lengths: Tensor,
    empty: Tensor,
    guidance: float,
) -> Tensor:
    """Mean velocity [B, 16, 8, 8] of the parent's guided Euler sub-steps from x [B, 16, 8, 8].

    step: grid interval, int64 [B]. features: [B, 32, D]. lengths: [B]. empty: [1, 32, D].
    """
    sigmas, start, batch = substep_sigmas()[step], x, len(x)
    nothing, short = empty.expand(batch, -1, -1), torch.full_like(lengths, 8)
    for j in range(SUBSTEPS):
        with torch.autocast("cpu", torch.bfloat16):
            both = parent(
                torch.cat([x, x]), sigmas[:, j].repeat(2), torch.cat([features, nothing]), torch.cat([lengths, short])
            )
        conditional, unconditional = both.chunk(2)
        velocity = unconditional + guidance * (conditional - unconditional)
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
        with torch.autocast("cpu", torch.bfloat16):
            velocity = student(x, torch.full((len(x),), sigmas[k]), features, lengths)
        x = torch.where((step > k)[:, None, None, None], x + (sigmas[k + 1] - sigmas[k]) * velocity, x)
    return x


def distillation_loss(
    parent: BatchedTransformer, student: BatchedTransformer, rows: Rows, features: Tensor, empty: Tensor,
    generator: torch.Generator, guidance: float,
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
    target = guided_mean_velocity(parent, x, step, features, rows.lengths, empty, guidance)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = student(x, sigma, features, rows.lengths)
    return ((velocity - target).square().mean(1) * rows.weight).mean()


def train(twins: Twins, args: argparse.Namespace) -> None:
    """Distills in one worker process; resumes from its last save."""
    torch.manual_seed(3)
    model = load_parent(args.folder, twins.rank, from_average=args.from_average)
    copied = copy.deepcopy(model.transformer).requires_grad_(True)
    student, named = BatchedTransformer(copied), list(copied.named_parameters())
    parameters = [p for _, p in named]
    optimizer, average, first = (
        SharedMuon(twins, named, args.muon_lr, args.adamw_lr),
        WeightAverage(parameters, 0.99),
        0,
    )
    path = args.folder / f"distilled_{twins.rank}.pt"
    if saved := load_state(path):
        copied.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.values, average.updates, first = saved["average"], saved["step"], saved["step"]
    maker = RowMaker(make_bank(twins, args.folder, args.bank), model.token_ids, DISTILLATION)
    empty = model.empty_features()
    twins.barrier()
    running, started = 0.0, time.monotonic()
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(9_000_000 + step * twins.world + twins.rank)
        rows = maker.draw(args.batch, args.batch * 3 // 8, generator)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = model.features(rows)
        loss = distillation_loss(model.velocity, student, rows, features, empty, generator, args.guidance)
        zero_gradients(parameters)
        loss.backward()
        twins.average_gradients(parameters, 1.0)
        optimizer.step(warmup_stable_decay(step, args.steps, warmup=20, decay=0.8))
        average.update()
        running = 0.96 * running + 0.04 * loss.item() if running else loss.item()
        if twins.rank == 0 and (step + 1) % 20 == 0:
            speed = (step + 1 - first) * args.batch * twins.world / (time.monotonic() - started)
            print(f"distill {step + 1}/{args.steps} {running:.4f} {speed:.0f} img/s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            if step + 1 == args.steps:
                average.swap()
            save_state(path, {"model": copied.state_dict(), "average": average.values,
                              "optimizer": optimizer.state_dict(), "step": step + 1})  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=24, help="per worker")
    parser.add_argument("--bank", type=int, default=24576)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--muon-lr", type=float, default=1e-3)
    parser.add_argument("--adamw-lr", type=float, default=5e-4)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--from-average", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    launch(train, args, workers=args.workers, port=29713)
