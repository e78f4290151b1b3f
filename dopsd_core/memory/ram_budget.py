"""How much RAM activations may take."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from ..host_memory import available_ram

_SHARE = 0.5
"""Of the RAM that is free: the system keeps files there too, the model's among them."""


def offloading_ram(config: TrainConfig, device: torch.device, processes: int = 1) -> int:
    """Bytes of RAM that the activations of each process may take; 0 without activation offloading.

    processes: how many train on this machine.
    """
    if not config.activation_offloading or device.type != "cuda":
        return 0
    free = available_ram()
    return 0 if free is None else int(free * _SHARE / processes)


def why_not_offloaded(ram: int, device: torch.device) -> str:
    """Why activation offloading has no effect, in one sentence.

    ram: what `offloading_ram` says.
    """
    if device.type != "cuda":
        return f"activation_offloading has no effect: the model runs on {device.type}, and it is for CUDA and ROCm"
    if not ram:
        return (
            "activation_offloading has no effect: the RAM that is free is not known without the package psutil, or the "
            "model is divided over several GPUs"
        )
    return "activation_offloading has no effect: nothing that fits into RAM saves time, or everything fits on the GPU"
