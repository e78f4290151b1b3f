"""Evaluates a trained model and says which gates it passes.

For every kind of prompt (gate_cases.py) and for the parent and the distilled transformer: the judge's accuracy per
attribute, the share of images with every judged attribute right, the Fréchet distance to real renders of the same
prompts, and sharpness. Printed, and written to `gate.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...demo.model_files import JUDGE_FILE, VAE_FILE
from ...demo.world import APPEARANCE, render
from ...files.atomic import write_atomic
from ...number_text import float_argument, int_argument
from ...sigmas import z_image_turbo_sigmas
from ..judge import Judge, frechet_distance, judge_features, judged_right, laplacian_energy, load_judge
from .batched import BatchedTransformer
from .data import load_autoencoder, own_or_shipped
from .distill import STEPS, SUBSTEPS, Guidance
from .gate_cases import Case, features_of, make_cases
from .pretrain import Parent, load_average, load_parent, load_student

Figures = Mapping[str, float]
PARENT, FEW, DISTILLED = "parent, guided sub-steps", f"parent, {STEPS} steps", f"distilled, {STEPS} steps"


@dataclass(frozen=True)
class Sampler:
    """A transformer with its steps.

    Attributes:
        velocity: the transformer.
        steps: Euler steps on Z-Image-Turbo's grid.
        guidance: of the parent; None without guidance.
    """

    velocity: BatchedTransformer
    steps: int
    guidance: Guidance | None = None

    @torch.no_grad()
    def __call__(self, features: Tensor, lengths: Tensor, noise: Tensor, empty: Tensor, *, is_open: bool) -> Tensor:
        """Latents [B, 16, 8, 8] from noise [B, 16, 8, 8]; features: [B, 32, D]; lengths: [B]; empty: [1, 32, D]."""
        sigmas, x = z_image_turbo_sigmas(self.steps), noise
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            s = torch.full((len(x),), sigma)
            velocity = self.velocity(x, s, features, lengths)
            if self.guidance is not None:
                nothing = self.velocity(x, s, empty.expand(len(x), -1, -1), torch.full_like(lengths, 8))
                scale = self.guidance.scale(torch.full((len(x),), is_open))
                velocity = self.guidance.velocity(x, s, velocity, nothing, scale)
            x = x + (after - sigma) * velocity
        return x


@dataclass(frozen=True)
class Gate:
    """A figure with the range in which it must lie.

    Attributes:
        name: what it is.
        value: the figure.
        low: the least allowed value.
        high: the greatest allowed value.
    """

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the value lies in the range."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        return f"{'PASS' if self.holds else 'FAIL'}  {self.name}: {self.value:.4g} ({self.low:g} to {self.high:g})"


def gates(table: Mapping[str, Figures], megabytes: float | None) -> list[Gate]:
    """The gates of the figures "<case> | <model>"; megabytes: size of all shipped files, None to leave it out."""

    def figure(case: str, key: str, model: str = DISTILLED) -> float:
        return table[f"{case} | {model}"][key]

    found = [
        Gate("bound names right", figure("named", "appearance"), low=0.99),
        Gate("bound names with every attribute right", figure("named", "all"), low=0.97),
        Gate("bound styles right", figure("named style and words", "appearance"), low=0.98),
        Gate("teacher's concept error, held out", 1 - figure("teacher, other view", "appearance"), high=0.005),
        Gate("style teacher's error", 1 - figure("teacher, style and words", "appearance"), high=0.02),
    ]
    for case in ("described", "open"):
        ratio = figure(case, "frechet", FEW) / figure(case, "frechet")
        found.append(Gate(f"Fréchet, parent's {STEPS} steps over the distilled's, {case}", ratio, low=3.0))
    for case in ("described", "open", "named", "teacher, other view"):
        found.append(Gate(f"sharpness, {case}", figure(case, "sharpness"), low=0.9, high=1.1))
    if megabytes is not None:
        found.append(Gate("megabytes of all files", megabytes, high=40.0))
    return found


def figures_of(images: Tensor, case: Case, judge: Judge) -> dict[str, float]:
    """The figures of images [n, 3, 64, 64] in [0, 1] of the case's prompts."""
    right = judged_right(judge, images, case.scenes.labels())
    out = {name: float(right[name].float().mean()) for name in case.judged}
    real = render(case.scenes)
    shown = [name for name in case.judged if name in APPEARANCE]
    if shown:
        out["appearance"] = sum(out[name] for name in shown) / len(shown)
        out["all"] = float(torch.stack([right[name] for name in shown]).all(0).float().mean())
    out["frechet"] = frechet_distance(judge_features(judge, images), judge_features(judge, real))
    out["sharpness"] = float(laplacian_energy(images).mean() / laplacian_energy(real).mean())
    return out


def samplers(folder: Path, parent: Parent, *, distilled: str, guidance: Guidance) -> dict[str, Sampler]:
    """The models by title; distilled: "no", "result", or "average" of an unfinished run."""
    found = {
        PARENT: Sampler(parent.velocity, STEPS * SUBSTEPS, guidance),
        FEW: Sampler(parent.velocity, STEPS),
    }
    if distilled != "no":
        student = load_student(folder)
        if distilled == "average":
            load_average(folder / "distilled", student, list(student.parameters()))
        found[DISTILLED] = Sampler(BatchedTransformer(student), STEPS)
    return found


@torch.no_grad()
def measure(
    folder: Path, parent: Parent, models: Mapping[str, Sampler], size: int, only: str = ""
) -> dict[str, dict[str, float]]:
    """The figures of every case (of those that begin with `only`) and model, under "<case> | <model>"."""
    judge = load_judge(own_or_shipped(folder, "judge.safetensors", JUDGE_FILE))
    vae = load_autoencoder(own_or_shipped(folder, "vae.safetensors", VAE_FILE))
    empty, table = parent.empty_features(), {}
    for case in make_cases(size, torch.Generator().manual_seed(4242)):
        if not case.name.startswith(only):
            continue
        features, lengths = features_of(parent, case)
        noise = torch.randn(len(features), 16, 8, 8, generator=torch.Generator().manual_seed(77))
        for title, model in models.items():
            images = torch.cat([
                vae.decode(model(*part, empty, is_open=case.is_open)).add(1).div(2).clamp(0, 1)
                for part in zip(features.split(64), lengths.split(64), noise.split(64), strict=True)
            ])  # fmt: skip
            table[f"{case.name} | {title}"] = figures = figures_of(images, case, judge)
            print(f"{case.name:25} | {title:25}", " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    return table


def run(args: argparse.Namespace) -> bool:
    """Measures, prints and writes gate.json; whether every gate holds."""
    parent = load_parent(args.folder, from_average=args.parent_average)
    guidance = Guidance(args.guidance, args.open_guidance, args.rescale)
    models = samplers(args.folder, parent, distilled=args.distilled, guidance=guidance)
    table = measure(args.folder, parent, models, args.size, args.only)
    files = list(args.shipped.glob("*")) if args.shipped else []
    megabytes = sum(file.stat().st_size for file in files) / 1e6 if files else None
    found = gates(table, megabytes) if DISTILLED in models and not args.only else []
    print("\n".join(map(str, found)))
    report = {"figures": table, "gates": [{**asdict(gate), "holds": gate.holds} for gate in found]}
    write_atomic(args.folder / "gate.json", (json.dumps(report, indent=2) + "\n").encode())
    return all(gate.holds for gate in found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", type=int_argument(), default=512, help="prompts of each kind")
    parser.add_argument("--only", default="", help="measure only kinds of prompts that begin so")
    parser.add_argument("--parent-average", action="store_true", help="use the average of an unfinished joint run")
    parser.add_argument("--distilled", choices=("no", "result", "average"), default="result")
    parser.add_argument("--guidance", type=float_argument(), default=Guidance.described)
    parser.add_argument("--open-guidance", type=float_argument(), default=Guidance.open)
    parser.add_argument("--rescale", type=float_argument(), default=Guidance.rescale)
    parser.add_argument("--shipped", type=Path, help="folder with the exported files, whose size is a gate too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    raise SystemExit(0 if run(args) else 1)
