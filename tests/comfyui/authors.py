"""The authors' training step, written down once more, for whichever network of diffusers' with peft's adapters.

Of ours it takes what is drawn by chance, so that both sides can be compared: the order of the images, the noise and
the LoRA's start. Both take STEPS optimizer steps, each over PER_STEP images, and their weights are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import twins
from inprocess import ComfyUI
from loras import give_values
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

STEPS, PER_STEP, RANK, SEED, LEARNING_RATE = 10, 2, 2, 3, 1e-4
# (width, height) and caption
IMAGES = {
    (96, 96): "a [V] badge on a sand background",
    (112, 80): "a photo of [V], seen from above",
    (80, 112): "[V]",
}
TRIGGER = "ohwx"

Velocity = Callable[[Tensor, float], Tensor]
"""(x [1, C, h, w], sigma) -> noise - x0 of the same shape."""


@dataclass(frozen=True)
class Pair:
    """One image: what the network predicts under the student's and under the teacher's condition, and the grid."""

    student: Velocity
    teacher: Velocity
    sigmas: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Trained:
    """Raw weights of student and teacher; of every step the loss and the norm of its gradients. start, gradients: of
    the authors' side only."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    start: Mapping[str, Tensor]
    gradients: Sequence[Mapping[str, Tensor]]


def captions() -> list[str]:
    return [caption.replace("[V]", TRIGGER) for caption in IMAGES.values()]


def write_images(folder: Path, seed: int = 4) -> list[Path]:
    """Images of the buckets' own sizes, since cropping has its own tests, and their captions."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for number, ((width, height), caption) in enumerate(IMAGES.items()):
        coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        array = pixels.mul(255).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return sorted(folder.glob("*.png"))


# -- our side ----------------------------------------------------------------------------------------------------------


def our_training(
    comfyui: ComfyUI, models: Mapping[str, Any], folder: str, steps: int = STEPS, **teacher: Any
) -> tuple[Any, Trained]:
    """(the training set, what came out) of our nodes in the executor; the weights are those of the last checkpoint.

    models: model, clip, vae and, where there is one, vision. teacher: inputs of Build Teacher Condition.
    """
    kinds = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "vision": "DOPSD_VISION"}
    names = [name for name in kinds if name in models]
    given = {name: ["models", number] for number, name in enumerate(names)}
    graph = {
        "models": give_values(comfyui, [kinds[name] for name in names], [models[name] for name in names]),
        "data": {
            "class_type": "DOPSD_LoadDataset",
            "inputs": {
                "folder": folder, "resolution": 96, "trigger": TRIGGER, "repeats": 1, "caption_dropout": 0.0,
            },
        },
        "conditions": {
            "class_type": "DOPSD_BuildTeacherCondition",
            "inputs": {
                "dataset": ["data", 0], **{name: given[name] for name in names if name != "model"},
                "preview_prompts": "", "anchor_prompts": "", **teacher,
            },
        },
        "train": {
            "class_type": "DOPSD_TrainLoRA",
            "inputs": {
                "model": given["model"], "conditions": ["conditions", 0], "run_name": folder, "preset": "paper",
                "steps": steps, "seed": SEED, "preview_every": 0, "learning_rate": LEARNING_RATE, "rank": RANK,
                "alpha": 0.0, "batch_size": 1, "grad_accumulation": PER_STEP, "warmup": 0, "rollout_steps": 4,
                "grad_steps": 0, "loss": "x0", "teacher": "ema", "ema_decay": 0.9999, "anchor_probability": 0.0,
                "objective": "dopsd", "schedule": "constant", "optimizer": "adamw", "checkpoint_every": 100,
                "probe_every": 0, "memory": "auto",
            },
        },
    }  # fmt: skip
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    place = Path(run.value("train", 2))
    last = place / "checkpoints" / f"step-{steps:06d}"
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    trained = Trained(
        load_file(last / "lora.safetensors"), load_file(last / "teacher.safetensors"),
        [row["loss"] for row in rows], [row["grad_norm"] for row in rows], {}, (),
    )  # fmt: skip
    return run.value("conditions").data, trained


# -- the authors' side -------------------------------------------------------------------------------------------------


def their_training(
    comfyui: ComfyUI, model: Any, network: Any, pairs: Sequence[Pair], data: Any, steps: int = STEPS
) -> Trained:
    """Their loop: K steps of the student, x0 loss against the EMA teacher, one backward over all K graphs and images,
    clip 1, AdamW, EMA. model: the MODEL that ours trained, for the LoRA's start; network: diffusers', in `pairs`."""
    draws, start = comfyui.core("training.rng"), _lora_start(comfyui, model)
    weights = {role: _adapter(network, role, start) for role in ("student", "teacher")}
    parameters = [weights["student"][key] for key in start]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    order = draws.DataOrder(data.shapes(), (1,) * len(data.examples), 1, SEED)
    losses, norms, gradients = [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        of_step = []
        for sample in range(PER_STEP):
            (number,) = order.batch(step * PER_STEP + sample)
            noise = draws.draw_noise(SEED, step, sample, [data.shapes()[number]])
            of_step.append(_rollout(network, pairs[number], noise))
        loss = torch.stack(of_step).mean()
        for parameter in parameters:  # peft switches this off with the adapter
            parameter.requires_grad_(True)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        gradients.append({key: weights["student"][key].grad.clone() for key in start})
        optimizer.step()
        with torch.no_grad():
            for key, average in weights["teacher"].items():
                average.mul_(0.9999).add_(weights["student"][key], alpha=0.0001)
        losses.append(float(loss.detach()))
    ends = {role: {key: p.detach().clone() for key, p in own.items()} for role, own in weights.items()}
    network.delete_adapters(["student", "teacher"])
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
    network.add_adapter(config, role)
    own = {key.replace(f".{role}.", "."): p for key, p in network.named_parameters() if f".{role}." in key}
    assert own.keys() == start.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(start[key])
    return own


def _lora_start(comfyui: ComfyUI, model: Any) -> dict[str, Tensor]:
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    config = denoiser.family.lora_config(RANK, 2.0 * RANK)
    return comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, seed=SEED).state()


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
            assert twins.relative(_together(mine, kind), _together(other, kind)) < 1e-3, kind
    left_out = total = 0
    for key, end in theirs.student.items():
        certain = _is_certain([step[key] for step in theirs.gradients])
        total, left_out = total + certain.numel(), left_out + int((~certain).sum())
        start = theirs.start[key]
        assert (end - start).norm() > 1e-5 * end.numel() ** 0.5
        assert twins.relative((ours.student[key] - start)[certain], (end - start)[certain]) < 1e-3, key
        if ".lora_B." in key:  # a step of the teacher's A, 1e-8, is less than fp32 resolves; its B grows from 0
            assert twins.relative(ours.teacher[key][certain], theirs.teacher[key][certain]) < 1e-3, key
    assert left_out < 2e-3 * total


def _together(weights: Mapping[str, Tensor], kind: str) -> Tensor:
    return torch.cat([weights[key].flatten() for key in sorted(weights) if kind in key])


def _is_certain(gradients: list[Tensor]) -> Tensor:
    """Where no step's gradient is made of rounding. A's first one is exactly zero, B being zero, and moves nothing."""
    return torch.stack([(g == 0).all() | (g.abs() > 1e-5 * g.abs().median()) for g in gradients]).all(0)
