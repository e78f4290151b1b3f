"""Checkpoints of weights in parts: each rank writes the parts that it holds (torch.distributed.checkpoint).

In place of `lora.safetensors`, `teacher.safetensors` and `optimizer.safetensors` there is a folder of each name with
safetensors files per rank. Any number of ranks can load them, one included.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import divided, is_sharded
from ..files.disk import DiskError, writing
from ..trainable import Trainable
from .checkpoint import (
    PARTS,
    SHARDED,
    Checkpoint,
    StateError,
    file_digest,
    is_whole,
    new_folder,
    put_in_place,
    remove_superfluous,
    write_facts,
)
from .world import Peers

_OF_PARAMETER = re.compile(r"state/(\d+)/")

Template = Callable[[str, torch.Size, torch.dtype], Tensor]


def save_sharded(folder: Path, checkpoint: Checkpoint, keep: int, peers: Peers) -> Path:
    """As `save_checkpoint`, by all ranks together, of tensors in parts; `folder` is on a disk that all of them share.

    Raises:
        DiskError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    with writing(final):
        if peers.first(lambda: is_whole(final)):
            return final
        unfinished = peers.first(lambda: new_folder(folder))
        try:
            _save_parts(unfinished, checkpoint)
            sums: dict[str, str] = {}
            for found in peers.all(lambda: _synced_digests(unfinished, peers.world.rank)):
                sums |= found
            peers.first(lambda: _finish(unfinished, final, checkpoint, sums, keep))
        except BaseException:
            if peers.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return final


def load_sharded(checkpoint: Checkpoint, weights: Trainable, parameters: Sequence[nn.Parameter]) -> Checkpoint:
    """The checkpoint with its tensors: in parts if the weights are, else whole.

    Args:
        checkpoint: with `shards`.
        weights: whose state it is.
        parameters: the optimizer's.

    Raises:
        StateError: the shards cannot be read.
    """
    folder = checkpoint.shards
    if folder is None:
        return checkpoint
    alone = not weights.is_sharded

    def of_parameter(path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        match = _OF_PARAMETER.match(path)
        like = parameters[int(match[1])] if match and int(match[1]) < len(parameters) else None
        if like is not None and is_sharded(like) and like.shape == shape:
            return torch.zeros_like(like.detach(), dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    def of_weight(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parts = _parts_of(weights)
        return torch.zeros_like(parts[name]) if name in parts else torch.empty(shape, dtype=dtype)

    templates = {"lora": of_weight, "teacher": of_weight, "optimizer": of_parameter}
    try:
        lora, teacher, optimizer = (_load(folder / part, templates[part], alone) for part in PARTS)
    except Exception as error:  # a damaged file can fail in any way inside the parsers
        raise StateError(f"the shards in {folder} cannot be read ({error}); delete that folder") from error
    return replace(checkpoint, shards=None, lora=lora, teacher=teacher, optimizer=optimizer)


def divided_state(state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's `state_dict()` whose whole tensors are divided as the parameters of their shapes are."""
    of_each = {
        index: {
            name: divided(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": of_each}


def _parts_of(weights: Trainable) -> Mapping[str, Tensor]:
    from ..adapters.sharded_weights import ShardedWeights

    return weights.parts("student") if isinstance(weights, ShardedWeights) else {}


def _save_parts(folder: Path, checkpoint: Checkpoint) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    for part in PARTS:
        tensors = {name: tensor.detach() for name, tensor in getattr(checkpoint, part).items()}
        (folder / part).mkdir(exist_ok=True)
        if not tensors:
            continue
        try:
            with _quiet():
                save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / part), save_distributed=True))
        except CheckpointException as error:
            failure = next(iter(error.failures.values()))[0]
            if isinstance(failure, OSError):
                raise failure from error
            raise DiskError(f"the checkpoint in {folder} could not be written: {failure}") from error


def _synced_digests(folder: Path, rank: int) -> dict[str, str]:
    """SHA-256 by name of the files that this rank wrote, which are on the disk afterwards."""
    digests = {}
    for path in sorted(folder.glob(f"*/shard-{rank + 1:05d}-*")):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        digests[path.relative_to(folder).as_posix()] = file_digest(path)
    return digests


def _finish(unfinished: Path, final: Path, checkpoint: Checkpoint, sums: Mapping[str, str], keep: int) -> None:
    write_facts(unfinished, checkpoint, sums, SHARDED)
    put_in_place(unfinished, final)
    remove_superfluous(final.parent, checkpoint.step, keep)


def _load(folder: Path, template: Template, alone: bool) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not any(folder.iterdir()):
        return {}
    with _quiet():
        stored: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            name: template(name, facts.size, facts.properties.dtype) for name, facts in stored.items()
        }
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on how it is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
