"""Data and runs for `TinyDenoiser`, so small that a training step takes a millisecond."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dopsd_core.adapters import Lora
from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.config import TrainConfig
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import AdamW
from dopsd_core.options import changed
from dopsd_core.teachers import EmaTeacher
from dopsd_core.training.trainer import train
from dopsd_core.training.training_set import TrainingSet
from tests.toy_denoiser import CHANNELS, FEATURES, TinyDenoiser


def make_pair(number: int, shape: tuple[int, int] = (2, 3), seed: int = 0) -> DualCondition:
    """A pair whose teacher reads something that its student does not."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    student = Condition(torch.randn(3 + number % 2, FEATURES, generator=generator))
    teacher = Condition(torch.randn(5, FEATURES, generator=generator) + 1)
    target = torch.randn(CHANNELS, *shape, generator=generator)
    return DualCondition(student, teacher, target, f"caption {number}", f"key-{seed}-{number}")


def make_data(count: int = 5, shapes: Sequence[tuple[int, int]] = ((2, 3), (3, 2)), **kwargs: Any) -> TrainingSet:
    """Pairs whose latent shapes take turns."""
    return TrainingSet([make_pair(number, shapes[number % len(shapes)]) for number in range(count)], **kwargs)


def make_config(**kwargs: Any) -> TrainConfig:
    """A short run without prior anchors; kwargs: options by flat name."""
    short = TrainConfig(
        steps=12,
        checkpoint_every=3,
        probe_every=4,
        objective=DOPSD(anchor_probability=0.0),
        adapter=Lora(rank=2, alpha=4.0, targets=("enter", "leave")),
        optimizer=AdamW(lr=1e-2),
        teacher=EmaTeacher(decay=0.9),
    )
    return changed(short, kwargs)


def killable_data() -> TrainingSet:
    """Anchors and a held-out pair too."""
    anchors = [make_pair(number, seed=7).student for number in range(3)]
    return make_data(5, anchors=anchors, heldout=make_pair(99))


def killable_config(steps: int, adapter: str = "lora") -> TrainConfig:
    """Everything that draws: anchors, m of K, accumulation, batches of two shapes, warm-up and cosine."""
    return make_config(
        steps=steps,
        adapter=adapter,
        anchor_probability=0.3,
        grad_steps=2,
        grad_accumulation=2,
        batch_size=2,
        warmup=3,
        schedule="cosine",
    )


def run_to_the_end(folder: str, steps: int, adapter: str = "lora") -> None:
    """The run that tests kill; called in a process of its own."""
    torch.set_num_threads(1)
    train(killable_config(steps, adapter), TinyDenoiser(), killable_data(), folder)


def run_until_call(folder: str, steps: int, name: str, number: int, adapter: str = "lora") -> None:
    """As `run_to_the_end`, and this process is killed at the n-th call of `os.<name>`, before the call."""
    real = getattr(os, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, counted)
    run_to_the_end(folder, steps, adapter)


def saved_bytes(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but the wall times: LoRA or model, and the tensors of its newest checkpoint."""
    newest = max((folder / "checkpoints").iterdir())
    saved = {f"checkpoint/{file.name}": file.read_bytes() for file in sorted(newest.glob("*.safetensors"))}
    (final,) = folder.glob("*.safetensors")
    lora = final.read_bytes()
    end = 8 + int.from_bytes(lora[:8], "little")
    header = json.dumps(json.loads(lora[8:end]), sort_keys=True)  # safetensors writes its metadata in random order
    return saved | {"step": newest.name.encode(), "header": header.encode(), "lora": lora[end:]}
