"""Evaluates a trained model: attribute accuracy on HELD-OUT combinations, and the benefit of the distillation.

Prints and writes to `gate.json` the judge's accuracy per attribute and the Frechet distance to real renders, for the
parent and the distilled transformer, with the teacher's condition (an image of the same badge elsewhere) and with full
text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ...demo.model_files import TEACHER_TEMPLATE, TEXT_TEMPLATE
from ...demo.world import APPEARANCE, TRIGGER, Scenes, caption, render, sample_scenes
from ...files.atomic import write_atomic
from ...sigmas import z_image_turbo_sigmas
from ..judge import frechet_distance, judge_features, judged_right, laplacian_energy, load_judge
from .batched import CAPTION_TOKENS, IMAGE_TOKENS, BatchedTransformer, pad_features, teacher_pixels
from .data import Bank, RowMaker, load_autoencoder
from .pretrain import Parent, load_parent
from .twins import load_state

CONDITIONS = ("teacher, other view", "teacher, the target", "full text", "full text, seen", "no words, seen")


@torch.no_grad()
def features_for(parent: Parent, kind: str, scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(features [n, 32, D], lengths [n]) of the scenes for one kind of condition."""
    empty = torch.zeros(0)
    maker = RowMaker(Bank(scenes, empty, empty), parent.token_ids)
    if not kind.startswith("teacher"):
        attributes = APPEARANCE if kind.startswith("full text") else ()
        texts = [TEXT_TEMPLATE.format(caption(scenes, i, attributes=attributes)) for i in range(len(scenes))]
        rows, lengths = maker.encode(texts, CAPTION_TOKENS)
        return pad_features(parent.encode(rows)), lengths
    template = TEACHER_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
    texts = [template.format(caption(scenes, i, name=TRIGGER)) for i in range(len(scenes))]
    shown = scenes if kind.endswith("target") else scenes.with_layout_of(sample_scenes(len(scenes), generator))
    rows, lengths = maker.encode(texts, CAPTION_TOKENS)
    return parent.encode(rows, teacher_pixels(render(shown))), lengths


@torch.no_grad()
def euler(
    model: BatchedTransformer,
    features: Tensor,
    lengths: Tensor,
    noise: Tensor,
    steps: int,
    empty: Tensor,
    guidance: float,
) -> Tensor:
    """Latents [B, 16, 8, 8] after `steps` Euler steps from noise [B, 16, 8, 8]; guidance 1 needs one forward per step.

    features: [B, 32, D]. lengths: [B]. empty: [1, 32, D].
    """
    sigmas, x = z_image_turbo_sigmas(steps), noise
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        s = torch.full((len(x),), sigma)
        velocity = model(x, s, features, lengths)
        if guidance != 1:
            unconditional = model(x, s, empty.expand(len(x), -1, -1), torch.full_like(lengths, 8))
            velocity = unconditional + guidance * (velocity - unconditional)
        x = x + (after - sigma) * velocity
    return x


@torch.no_grad()
def measure(folder: Path, size: int, *, from_average: bool, distilled: bool) -> dict[str, dict[str, float]]:
    """The scores of every condition and model, on `size` scenes each."""
    parent = load_parent(folder, 0, from_average=from_average)
    judge, vae = load_judge(folder / "judge.safetensors"), load_autoencoder(folder / "vae.safetensors")
    models = {"parent, 8 steps, guidance 2": (parent.velocity, 8, 2.0), "parent, 4 steps": (parent.velocity, 4, 1.0)}
    if distilled:
        student = Parent()
        state = load_state(folder / "distilled_0.pt")
        assert state is not None
        student.transformer.load_state_dict(state["model"])
        models["distilled, 4 steps"] = (student.velocity, 4, 1.0)
    empty = parent.empty_features()
    table = {}
    for kind in CONDITIONS:
        generator = torch.Generator().manual_seed(4242)
        scenes = sample_scenes(size, generator, held_out=not kind.endswith("seen"))
        features, lengths = features_for(parent, kind, scenes, generator)
        noise, real = torch.randn(size, 16, 8, 8, generator=generator), render(scenes)
        for name, (model, steps, guidance) in models.items():
            latents = [
                euler(model, *part, steps, empty, guidance)
                for part in zip(features.split(64), lengths.split(64), noise.split(64), strict=True)
            ]
            images = torch.cat([vae.decode(part) for part in latents]).add(1).div(2).clamp(0, 1)
            right = judged_right(judge, images, scenes.labels())
            figures = {k: v.float().mean().item() for k, v in right.items()}
            figures["frechet"] = frechet_distance(judge_features(judge, images), judge_features(judge, real))
            figures["sharpness"] = float(laplacian_energy(images).mean() / laplacian_energy(real).mean())
            table[f"{kind} | {name}"] = figures
            print(f"{kind:20} | {name:27}", " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--from-average", action="store_true", help="use the average of an unfinished joint run")
    parser.add_argument("--no-distilled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(args.folder, args.size, from_average=args.from_average, distilled=not args.no_distilled)
    write_atomic(args.folder / "gate.json", (json.dumps(table, indent=2) + "\n").encode())
