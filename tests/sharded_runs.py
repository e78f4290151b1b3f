"""Trainings of all weights of a small network on several processes, which hold a part of it each."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopsd_core.adapters.full_weights import FullWeights
from dopsd_core.adapters.sharded_weights import ShardedWeights
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import TrainConfig
from dopsd_core.options import changed
from dopsd_core.training.checkpoint import Checkpoint, load_checkpoint
from dopsd_core.training.sharded_checkpoint import load_sharded
from dopsd_core.training.trainer import NoCallbacks, train
from tests.drawn_previews import Draws
from tests.forked import forking
from tests.ranks import KilledAt, free_port
from tests.stopping import StopAt
from tests.tiny import killable_config, killable_data, make_config
from tests.toy_denoiser import ToyDenoiser, ToyNet

STEPS = 6


class Net(ToyNet):
    """A ToyNet that computes in the dtype of its weights, as networks of diffusers do."""

    def forward(self, x: Tensor, sigma: float, features: Sequence[Tensor]) -> Tensor:
        dtype = self.embed.weight.dtype
        batch, channels, height, width = x.shape
        time = self.time(torch.full((1, 1, 1), sigma, dtype=dtype, device=x.device))
        tokens = self.embed(x.to(dtype).flatten(2).mT) + time
        tokens = tokens + torch.stack([self.text(f.to(x.device, dtype)).mean(0) for f in features])[:, None]
        for layer in self.layers:
            tokens = layer(tokens)
        return self.final(tokens).mT.reshape(batch, channels, height, width).float()


class NetDenoiser(ToyDenoiser):
    """A host of `Net`; the forward `fails_at` raises."""

    def __init__(self, dtype: torch.dtype = torch.float32, fails_at: int = -1) -> None:
        super().__init__(Net().to(dtype))
        self.compute_dtype, self.fails_at, self.calls = dtype, fails_at, 0

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("CUDA out of memory")
        return super().predict_x0(x, sigma, conditions)


def full_config(**options: Any) -> TrainConfig:
    """Everything that draws, with batches of one sample."""
    flat = {"batch_size": 1, "grad_accumulation": 4, **options}
    if options.get("objective", "dopsd") != "dopsd":  # the options of one objective are not those of another
        base = make_config(steps=STEPS, adapter="full", objective=options["objective"])
        return changed(base, {name: value for name, value in flat.items() if value is not None})
    return changed(killable_config(STEPS, "full"), flat)


def run(
    folder: Path,
    config: TrainConfig,
    world: Any = None,
    callbacks: Any = None,
    dtype: str = "float32",
    fails_at: int = -1,
) -> Any:
    torch.set_num_threads(1)
    denoiser = NetDenoiser(getattr(torch, dtype), fails_at)
    callbacks = callbacks or Draws(folder, denoiser, world, in_parts=world is not None)
    return train(config, denoiser, killable_data(), folder, callbacks, world=world)


def whole_checkpoint(folder: Path, config: TrainConfig, dtype: str = "float32") -> Checkpoint:
    """The newest checkpoint of a run, as one process reads it."""
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    weights = FullWeights(NetDenoiser(getattr(torch, dtype)).network())
    return load_sharded(checkpoint, weights, weights.parameters())


# -- processes ---------------------------------------------------------------------------------------------------------


class Rank:
    """What one process does; picklable."""

    def __init__(self, folder: Path, config: TrainConfig, **options: Any) -> None:
        self.folder, self.config, self.options = folder, config, options

    def __call__(self, rank: int, size: int, port: int, errors: Any) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        from dopsd_core.standalone.accelerate_world import joined_world

        try:
            with joined_world(on_cpu=True) as world:
                self.work(world, rank)
        except BaseException as error:
            errors.put((rank, f"{type(error).__name__}: {error}"))
            errors.close()
            errors.join_thread()  # it is sent by a thread, which the exit would end
            traceback.print_exc()
            os._exit(1)  # as a launcher's process, which is ended if it does not end

    def work(self, world: Any, rank: int) -> None:
        options = dict(self.options)
        killed = options.pop("killed_at", {})
        stop, only = options.pop("stop_at", None), options.pop("only_rank", None)
        if only is not None and rank != only:
            options.pop("fails_at", None)
        callbacks = StopAt(stop) if stop else None
        if killed:  # no rank draws, since all have to
            callbacks = KilledAt(killed[rank]) if rank in killed else NoCallbacks()
        run(self.folder, self.config, world, callbacks, **options)


class OtherModes(Rank):
    """Each rank switches to other weights than the others."""

    def work(self, world: Any, rank: int) -> None:
        denoiser = NetDenoiser()
        weights = ShardedWeights(denoiser.network(), denoiser.blocks(), world.mesh)
        with weights.attached(), weights.use("off" if rank else "teacher"):
            raise AssertionError("the ranks did not notice")


def on_processes(size: int, work: Callable[..., None], wait: float = 120) -> tuple[list[int | None], list[str]]:
    """(exit codes, errors) of the ranks."""
    context = forking()
    errors, port = context.Queue(), free_port()
    children = [context.Process(target=work, args=(rank, size, port, errors)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(wait)
    alive = [child for child in children if child.is_alive()]
    for child in alive:
        child.kill()
        child.join()
    found = []
    while not errors.empty():
        found.append("rank {}: {}".format(*errors.get()))
    assert not alive, f"a rank did not end: {found}"
    return [child.exitcode for child in children], sorted(found)
