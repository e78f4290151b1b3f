"""The optimizer of the adapters and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..config import ConfigError, TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the optimizer step with index `step` (from 0), a function of nothing else."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(config: TrainConfig, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the adapters, in 8 bits when asked for.

    Raises:
        ConfigError: 8 bits are asked for and bitsandbytes cannot be imported.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except Exception as error:  # bitsandbytes fails in its own ways where its CUDA library is missing
        raise ConfigError(
            (f"optimizer adamw8bit needs bitsandbytes ({error}); install it, or set optimizer to adamw",)
        ) from error
    return AdamW8bit(parameters, lr=config.lr, weight_decay=config.weight_decay)
