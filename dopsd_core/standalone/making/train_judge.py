"""Trains the judge on real renders of all appearances, including held-out ones, which it must recognize."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...demo.world import NUM_CLASSES, render, sample_scenes
from ...number_text import float_argument, int_argument
from ..judge import Judge, judged_right, load_judge
from .batched import autocast
from .optim import SharedMuon
from .stage import Stage, StageRun
from .twins import Twins, launch


def judge_loss(judge: Judge, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """(summed cross entropy on `batch` new renders, scalar; the same for the log)."""
    scenes = sample_scenes(batch, generator, held_out=None)
    images = render(scenes)
    noise = torch.rand(batch, 1, 1, 1, generator=generator) * 0.06  # so that single pixels do not decide
    images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    with autocast():
        logits = judge(images.contiguous(memory_format=torch.channels_last))
    labels = scenes.labels()
    loss = sum((F.cross_entropy(logits[name].float(), labels[name]) for name in NUM_CLASSES), torch.zeros(()))
    return loss, {"loss": loss.item()}


def train(twins: Twins, args: argparse.Namespace) -> None:
    """Trains the judge and writes `judge.safetensors`; resumes from its newest checkpoint."""
    torch.manual_seed(2)
    judge = Judge()
    if args.start is not None:
        judge.load_state_dict(load_judge(args.start).state_dict())
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = Stage("judge", args.folder, args.steps, 96, 500_000, decay=0.6, average=0.0, minutes=args.minutes)
    optimizer = SharedMuon(twins, judge.named_parameters(), None, args.peak)
    if not StageRun(twins, stage, judge, optimizer).run(lambda n, generator: judge_loss(judge, n, generator)):
        return
    judge.eval()
    scenes = sample_scenes(1024, torch.Generator().manual_seed(7), held_out=True)
    right = judged_right(judge, render(scenes), scenes.labels())
    print("judge on held-out renders:", {name: round(value.float().mean().item(), 4) for name, value in right.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="file of a judge that is trained further")
    parser.add_argument("--steps", type=int_argument(), default=800)
    parser.add_argument("--peak", type=float_argument(), default=2e-3)
    parser.add_argument("--minutes", type=float_argument(), default=0.0, help="checkpoint and stop after this long")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    launch(train, args, workers=1)
