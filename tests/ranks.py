"""Runs of several ranks: threads that stand in for processes, and real processes on gloo."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopsd_core.conditioning.encode import Condition
from dopsd_core.optimizers import AdamW8bit
from dopsd_core.training.trainer import NoCallbacks, train
from tests.forked import forking
from tests.tiny import TinyDenoiser, killable_config, killable_data


class ThreadWorld:
    """A rank among threads of this process; each waits for the others as a process would."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self.mesh, self._barrier, self._slots = rank, size, None, barrier, slots

    def gather(self, value: Any) -> list[Any]:
        return [pickle.loads(sent) for sent in self._exchange(pickle.dumps(value))]

    def broadcast(self, value: Any) -> Any:
        return pickle.loads(self._exchange(pickle.dumps(value))[0])  # each rank has its own tensors

    def sum_(self, tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(torch.stack(self._exchange(tensor.clone())).sum(0))

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(30)
        found = list(self._slots)
        self._barrier.wait(30)
        return found


def on_threads(size: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `work` returns, or the exception it raises, on each rank."""
    barrier = threading.Barrier(size)
    slots: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, size, barrier, slots))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for another one"
    return results


# -- processes ---------------------------------------------------------------------------------------------------------


class KilledAt(NoCallbacks):
    """Kills this process with SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, report: Any) -> None:
        if report.step == self._step:
            os.kill(os.getpid(), 9)


class Bf16Denoiser(TinyDenoiser):
    """Its weights are bf16, and it computes in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        return super().predict_x0(x.bfloat16(), sigma, [c.to(x.device, torch.bfloat16) for c in conditions]).float()


def run_kind(kind: str, folder: str | Path, steps: int, callbacks: Any = None, world: Any = None) -> Any:
    """A run of four batches per step; kind: "fp32", "bf16", or "adamw8bit", whose weights are enough for 8 bits."""
    config, denoiser = killable_config(steps).replace(grad_accumulation=4), TinyDenoiser()
    if kind == "bf16":
        denoiser = Bf16Denoiser()
    if kind == "adamw8bit":
        config = config.replace(adapter=config.adapter.replace(rank=512, alpha=512.0), optimizer=AdamW8bit(lr=1e-2))
    return train(config, denoiser, killable_data(), folder, callbacks, world=world)


def run_rank(folder: str, steps: int, rank: int, size: int, port: int, killed_at: int = -1, kind: str = "") -> None:
    """The run that tests kill, or one of a kind, as one process of `size`."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    from dopsd_core.standalone.accelerate_world import joined_world

    torch.set_num_threads(1)
    with joined_world(on_cpu=True) as world:
        if kind:
            run_kind(kind, folder, steps, KilledAt(killed_at), world)
            return
        train(killable_config(steps), TinyDenoiser(), killable_data(), folder, KilledAt(killed_at), world=world)


def on_processes(
    folder: Path, steps: int, size: int, killed_at: Sequence[int] = (), kind: str = ""
) -> list[int | None]:  # fmt: skip
    """Exit codes of the ranks; killed_at: the step after which each is killed, -1 for never; kind: as of `run_kind`."""
    context, port = forking(), free_port()
    children = [
        context.Process(
            target=run_rank,
            args=(str(folder), steps, rank, size, port, dict(enumerate(killed_at)).get(rank, -1), kind),
        )
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    alive = [child for child in children if child.is_alive()]
    for child in alive:
        child.kill()
        child.join()
    assert not alive, "a rank did not end"
    return [child.exitcode for child in children]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
