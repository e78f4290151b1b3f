"""The authors' training step, written down once more, for whichever network of diffusers' with peft's adapters.

Its weights are compared with ours, inside ComfyUI and without. Of ours it takes what is drawn by chance: the order of
the images, the noise and the LoRA's start. Imports neither the core nor ComfyUI.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

STEPS, PER_STEP, RANK, SEED, LEARNING_RATE, DECAY = 10, 2, 2, 3, 1e-4, 0.9999

Velocity = Callable[[Tensor, float], Tensor]
"""(x [1, C, h, w], sigma) -> noise - x0 of the same shape."""

Draw = Callable[[int, int], tuple[int, Tensor]]
"""(optimizer step, image of the step) -> (number of the image, its noise [1, C, h, w])."""


@dataclass(frozen=True)
class Pair:
    """One image: what the network predicts under the student's and under the teacher's condition, and the grid."""

    student: Velocity
    teacher: Velocity
    sigmas: Sequence[float]


@dataclass(frozen=True, eq=False)
class Trained:
    """Raw weights of student and teacher; of every step the loss and the norm of its gradients. start, gradients: of
    the authors' side only."""

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    losses: Sequence[float]
    norms: Sequence[float]
    start: Mapping[str, Tensor]
    gradients: Sequence[Mapping[str, Tensor]]


def our_run(folder: Path, steps: int = STEPS) -> Trained:
    """What a run of ours left; the weights are those of its last checkpoint."""
    last = folder / "checkpoints" / f"step-{steps:06d}"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    student, teacher = (load_file(last / f"{name}.safetensors") for name in ("lora", "teacher"))
    return Trained(student, teacher, [row["loss"] for row in rows], [row["grad_norm"] for row in rows], {}, ())


def their_run(
    network: Any, start: Mapping[str, Tensor], pairs: Sequence[Pair], draw: Draw, steps: int = STEPS
) -> Trained:
    """Their loop: K steps of the student, x0 loss against the EMA teacher, one backward over all K graphs and images,
    clip 1, AdamW, EMA. The network keeps its adapters."""
    weights = {role: _adapter(network, role, start) for role in ("student", "teacher")}
    parameters = [weights["student"][key] for key in start]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses, norms, gradients = [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        drawn = [draw(step, image) for image in range(PER_STEP)]
        loss = torch.stack([_rollout(network, pairs[number], noise) for number, noise in drawn]).mean()
        for parameter in parameters:  # peft switches this off with the adapter
            parameter.requires_grad_(True)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        gradients.append({key: weights["student"][key].grad.clone() for key in start})
        optimizer.step()
        with torch.no_grad():
            for key, average in weights["teacher"].items():
                average.mul_(DECAY).add_(weights["student"][key], alpha=1 - DECAY)
        losses.append(float(loss.detach()))
    ends = {role: {key: p.detach().clone() for key, p in own.items()} for role, own in weights.items()}
    return Trained(**ends, losses=losses, norms=norms, start=start, gradients=gradients)


def _rollout(network: Any, pair: Pair, x: Tensor) -> Tensor:
    """The mean loss along the student's own way from the noise x [1, C, h, w]."""
    losses = []
    for sigma, following in pairwise(pair.sigmas):
        with torch.no_grad():
            network.set_adapter("teacher")
            x0_teacher = x - sigma * pair.teacher(x, sigma)
        network.set_adapter("student")
        v = pair.student(x, sigma)
        losses.append(torch.nn.functional.mse_loss(x - sigma * v, x0_teacher))
        x = (x + (following - sigma) * v).detach()
    return torch.stack(losses).mean()


def _adapter(network: Any, role: str, start: Mapping[str, Tensor]) -> dict[str, Any]:
    """The parameters of a new adapter of peft's, under the keys of `start`."""
    from peft import LoraConfig

    names = sorted({key.rsplit(".lora_", 1)[0] for key in start})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights="gaussian")
    with warnings.catch_warnings():  # two adapters are what is wanted
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        network.add_adapter(config, role)
    own = {key.replace(f".{role}.", "."): p for key, p in network.named_parameters() if f".{role}." in key}
    assert own.keys() == start.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(start[key])
    return own


# -- the same ----------------------------------------------------------------------------------------------------------


def assert_same_curves(ours: Trained, theirs: Trained) -> None:
    """Losses and gradient norms of every step; AdamW would hide a factor on the loss or on all gradients."""
    assert len(ours.losses) == len(theirs.losses) > 0
    assert torch.tensor(ours.losses).allclose(torch.tensor(theirs.losses), rtol=1e-4)
    assert torch.tensor(ours.norms).allclose(torch.tensor(theirs.norms), rtol=1e-4)


def assert_same_weights(ours: Trained, theirs: Trained, parts: int) -> None:
    """To 1e-3: all of the student's and the teacher's weights; and each tensor's way from the start.

    Adam's first step is g / |g|: where a gradient is a hundred thousand times smaller than its neighbours, it is
    rounding, and the step may point anywhere. Such elements (one in thousands) count in the first comparison and are
    left out of the second, where a single one of them would be more than 1e-3 of its tensor.
    """
    for mine, other in ((ours.student, theirs.student), (ours.teacher, theirs.teacher)):
        assert mine.keys() == other.keys() and len(mine) == 2 * parts
        for kind in (".lora_A.", ".lora_B."):
            assert relative(_together(mine, kind), _together(other, kind)) < 1e-3, kind
    left_out = total = 0
    for key, end in theirs.student.items():
        certain = _is_certain([step[key] for step in theirs.gradients])
        total, left_out = total + certain.numel(), left_out + int((~certain).sum())
        start = theirs.start[key]
        assert (end - start).norm() > 1e-5 * end.numel() ** 0.5
        assert relative((ours.student[key] - start)[certain], (end - start)[certain]) < 1e-3, key
        if ".lora_B." in key:  # a step of the teacher's A, 1e-8, is less than fp32 resolves; its B grows from 0
            assert relative(ours.teacher[key][certain], theirs.teacher[key][certain]) < 1e-3, key
    assert left_out < 2e-3 * total


def relative(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| of tensors of any shape."""
    assert got.shape == wanted.shape and float(wanted.norm()) > 0
    return float((got - wanted).norm() / wanted.norm())


def _together(weights: Mapping[str, Tensor], kind: str) -> Tensor:
    return torch.cat([weights[key].flatten() for key in sorted(weights) if kind in key])


def _is_certain(gradients: Sequence[Tensor]) -> Tensor:
    """Where no step's gradient is made of rounding. A's first one is exactly zero, B being zero, and moves nothing."""
    return torch.stack([(g == 0).all() | (g.abs() > 1e-5 * g.abs().median()) for g in gradients]).all(0)
