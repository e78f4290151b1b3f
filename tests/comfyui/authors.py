"""Trainings of our nodes, and the authors' step (`tests/plain_step.py`) on the same images, noise and start."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from inprocess import ComfyUI
from loras import give_values
from PIL import Image
from plain_step import (
    LEARNING_RATE,
    PER_STEP,
    RANK,
    SEED,
    STEPS,
    Pair,
    Trained,
    Velocity,
    assert_same_curves,
    assert_same_weights,
    our_run,
    their_run,
)
from torch import Tensor

__all__ = ["Pair", "Trained", "Velocity", "assert_same_curves", "assert_same_weights"]

# (width, height) and caption
IMAGES = {
    (96, 96): "a [V] badge on a sand background",
    (112, 80): "a photo of [V], seen from above",
    (80, 112): "[V]",
}
TRIGGER = "ohwx"


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
    return run.value("conditions").data, our_run(Path(run.value("train", 2)), steps)


# -- the authors' side -------------------------------------------------------------------------------------------------


def their_training(
    comfyui: ComfyUI, model: Any, network: Any, pairs: Sequence[Pair], data: Any, steps: int = STEPS
) -> Trained:
    """Their loop. model: the MODEL that ours trained, for the LoRA's start; network: diffusers', in `pairs`."""
    draws = comfyui.core("training.rng")
    order = draws.DataOrder(data.shapes(), (1,) * len(data.examples), 1, SEED)

    def draw(step: int, image: int) -> tuple[int, Tensor]:
        (number,) = order.batch(step * PER_STEP + image)
        return number, draws.draw_noise(SEED, step, image, [data.shapes()[number]])

    trained = their_run(network, _lora_start(comfyui, model), pairs, draw, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter student was active")
        network.delete_adapters(["student", "teacher"])
    return trained


def _lora_start(comfyui: ComfyUI, model: Any) -> dict[str, Tensor]:
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    config = denoiser.family.lora_config(RANK, 2.0 * RANK)
    return comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, seed=SEED).state()
