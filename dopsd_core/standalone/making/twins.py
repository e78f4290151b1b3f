"""Data parallelism of the training scripts: one single-threaded process per core, one all-reduce per step.

On a small shared machine this is several times faster than one process with OpenMP threads, which wait for each other
when other programs run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn


@dataclass
class Twins:
    """A worker process.

    Attributes:
        rank: index of this worker.
        world: number of workers.
        started: start time, `time.monotonic`.
    """

    rank: int
    world: int
    started: float = field(default_factory=time.monotonic)

    def average_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """All-reduces the gradients in one flat tensor, clips their global norm, returns the norm before clipping."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in grads])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        norm = flat.norm().item()
        flat *= min(1.0, max_norm / (norm + 1e-6))
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.copy_(piece.view_as(p))  # copied, not viewed: a fused optimizer needs the parameter's strides
        return norm

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copies a tensor of any shape from worker `source` to all others, in place."""
        if self.world > 1:
            dist.broadcast(tensor, source)

    def agreed(self, flags: Sequence[bool]) -> list[bool]:
        """Worker 0's flags on every worker: clocks differ, but all must save and stop at the same step."""
        tensor = torch.tensor(list(flags), dtype=torch.uint8)
        self.broadcast(tensor, 0)
        return [bool(flag) for flag in tensor]

    def barrier(self) -> None:
        """Waits for all workers."""
        if self.world > 1:
            dist.barrier()


def _worker(rank: int, world: int, port: int, main: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    main(Twins(rank, world), *args)
    if world > 1:
        dist.destroy_process_group()


def launch(main: Callable, *args, workers: int, port: int = 29711) -> None:
    """Runs `main(twins, *args)` in `workers` processes."""
    # otherwise glibc returns large blocks to the kernel at every free, and page faults take a third of a CPU step
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1", MALLOC_TOP_PAD_=str(64 << 20))
    mp.spawn(_worker, (workers, port, main, args), nprocs=workers)  # type: ignore[attr-defined]


def warmup_stable_decay(step: int, steps: int, warmup: int = 50, decay: float = 0.3) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, constant, then linear decay to 0 over the last `decay` share.

    While it is constant, the run does not depend on `steps`, so a resumed run may be longer or shorter.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


class WeightAverage:
    """Exponential moving average of parameters, with a lower decay at the start."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current parameters."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the averaged and the current values; call twice to undo."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)

    @torch.no_grad()
    def load(self, values: Mapping[int, Tensor], updates: int) -> None:
        """Takes saved values by index, each in its parameter's shape, after `updates` updates."""
        for i, value in enumerate(self.values):
            value.copy_(values[i])
        self.updates = updates
