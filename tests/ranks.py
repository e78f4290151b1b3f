"""Runs of several ranks: threads that stand in for processes, and real processes on gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopsd_core.training.trainer import NoCallbacks, train
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


def run_rank(folder: str, steps: int, rank: int, size: int, port: int, killed_at: int = -1) -> None:
    """The run that tests kill, as one process of `size`."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    from dopsd_core.standalone.accelerate_world import joined_world

    torch.set_num_threads(1)
    with joined_world(on_cpu=True) as world:
        train(killable_config(steps), TinyDenoiser(), killable_data(), folder, KilledAt(killed_at), world=world)


def on_processes(folder: Path, steps: int, size: int, killed_at: Sequence[int] = ()) -> list[int | None]:
    """Exit codes of the ranks; killed_at: the step after which each is killed, -1 for never."""
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["tests.ranks"])  # type: ignore[attr-defined]
    port = free_port()
    children = [
        context.Process(
            target=run_rank, args=(str(folder), steps, rank, size, port, dict(enumerate(killed_at)).get(rank, -1))
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
