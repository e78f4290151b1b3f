"""Several processes on accelerate: `accelerate launch -m dopsd_core train ...`, or torchrun.

Both launchers set WORLD_SIZE and RANK, and restart or end the other processes if one of them ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..dtensors import mesh_of
from ..training.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(hours=2)
"""How long a process waits for another one, which may be encoding the dataset or drawing previews."""


def launched_processes() -> int:
    """The number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def local_rank() -> int:
    """Index of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0") or 0)


class AccelerateWorld:
    """accelerate's process group as a `World`; made once per process."""

    def __init__(self, on_cpu: bool) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
        self._on_cpu = on_cpu
        self._mesh: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """Index of this process among all machines, from 0."""
        return self._state.process_index

    @property
    def size(self) -> int:
        """Number of processes on all machines."""
        return self._state.num_processes

    @property
    def mesh(self) -> DeviceMesh | None:
        """All processes in one row."""
        if self._mesh is None:
            self._mesh = mesh_of("cpu" if self._on_cpu else "cuda", self.size)
        return self._mesh

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        from accelerate.utils import gather_object

        return gather_object([value])

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def sum_(self, tensor: Tensor) -> None:
        """Replaces the tensor, of any shape, by its sum over all ranks."""
        from accelerate.utils import reduce

        total = reduce(tensor, "sum")
        assert isinstance(total, Tensor)
        tensor.copy_(total)

    def leave(self) -> None:
        """Closes the process group."""
        self._state.destroy_process_group()


@contextmanager
def joined_world(on_cpu: bool) -> Iterator[World | None]:
    """The world of the launched processes inside the `with` block; None if there is only this one."""
    if launched_processes() == 1:
        yield None
        return
    world = AccelerateWorld(on_cpu)
    try:
        yield world
    except BaseException as error:
        from .one_voice import announce

        announce(error)
        raise
    finally:
        world.leave()
