"""Trains the judge on real renders of all appearances, including held-out ones, which it must recognize."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ...demo.world import NUM_CLASSES, render, sample_scenes
from ..judge import Judge, judged_right
from .twins import warmup_stable_decay


def train(folder: Path, steps: int, batch: int = 96, peak: float = 2e-3) -> None:
    """Trains with peak learning rate `peak` and writes `judge.safetensors`."""
    torch.manual_seed(2)
    judge = Judge()
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), peak, weight_decay=0.01)
    started = time.monotonic()
    for step in range(steps):
        generator = torch.Generator().manual_seed(500_000 + step)
        scenes = sample_scenes(batch, generator, held_out=None)
        images = render(scenes)
        noise = torch.rand(batch, 1, 1, 1, generator=generator) * 0.06  # so that single pixels do not decide
        images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup_stable_decay(step, steps, decay=0.6)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(images.contiguous(memory_format=torch.channels_last))
        labels = scenes.labels()
        loss = sum((F.cross_entropy(logits[name].float(), labels[name]) for name in NUM_CLASSES), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"judge {step + 1}/{steps} loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    judge.eval()
    scenes = sample_scenes(1024, torch.Generator().manual_seed(7), held_out=True)
    right = judged_right(judge, render(scenes), scenes.labels())
    print("judge on held-out renders:", {name: round(value.float().mean().item(), 4) for name, value in right.items()})
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, folder / "judge.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train(args.folder, args.steps)
