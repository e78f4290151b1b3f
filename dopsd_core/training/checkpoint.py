"""Checkpoints that survive a kill at any time.

A checkpoint is a folder `step-000123` with `lora.safetensors`, `teacher.safetensors`, `optimizer.safetensors` and
`state.json`, which contains the checksums of the others. It is written under a temporary name and renamed when it is
complete; older ones are removed only afterwards. Later damage is detected by the checksums, and the previous checkpoint
is used. One of weights in parts has folders of shards in place of the three files (`sharded_checkpoint.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from ..files.atomic import sync_folder
from ..files.disk import writing
from ..transfer import copies_on_host

log = logging.getLogger("dopsd")

FORMAT = "dopsd-checkpoint-2"
SHARDED = "dopsd-checkpoint-2-shards"
_READABLE = ("dopsd-checkpoint-1", FORMAT, SHARDED)  # 1: the optimizer's "state" alone, by `unflatten_paths`
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".unfinished-"
PARTS = ("lora", "teacher", "optimizer")


class StateError(RuntimeError):
    """Raised if a run's saved state cannot be used; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step: optimizer steps done.
        lora: raw tensors of the student (`AdapterSet.state`), for LoRA [rank, in] and [rows, rank].
        teacher: the same of the teacher; may be empty.
        optimizer: tensors of the optimizer's state, of any shape, by path (`flatten_state`).
        facts: everything else, JSON-serializable: configuration, dataset, initial gaps, rest of the optimizer's state.
        shards: the folder whose shards contain the tensors, which are not loaded yet; None if they are here.
    """

    step: int
    lora: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    shards: Path | None = None

    def copied(self) -> Checkpoint:
        """The same on the CPU, independent of the run: the optimizer's tensors, of any shape, are its own otherwise."""
        return replace(self, optimizer=copies_on_host(self.optimizer))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Writes `checkpoint` in `folder`, removes all but the `keep` newest, and returns its folder.

    An intact checkpoint of the same step is kept, a damaged one is replaced. Folders of later steps are removed: they
    are damaged if the run was resumed from an earlier step.

    Raises:
        DiskError: the disk is full or not writable; older checkpoints are untouched.
    """
    size = sum(t.numel() * t.element_size() for part in PARTS for t in getattr(checkpoint, part).values())
    with writing(folder / f"step-{checkpoint.step:06d}", size):
        return _save(folder, checkpoint, keep)


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`, intact or not, newest first."""
    return _steps(folder) if folder.is_dir() else []


def saved_facts(folder: Path) -> tuple[int, Mapping[str, Any]] | None:
    """(step, facts) of the newest checkpoint with an intact `state.json`; None if there is none. Reads no tensors."""
    for step in saved_steps(folder):
        try:
            return step, _read_state(folder / f"step-{step:06d}")["facts"]
        except Exception as error:  # a damaged file can fail in any way inside the parser
            log.debug("the state of step %d cannot be read: %s", step, error)
    return None


def _save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:06d}"
    if not is_whole(final):
        unfinished = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            _write(unfinished, checkpoint)
            put_in_place(unfinished, final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    remove_superfluous(folder, checkpoint.step, keep)
    return final


def new_folder(folder: Path) -> Path:
    """Makes the folder of an unfinished checkpoint in `folder`, which `load_checkpoint` removes after a kill."""
    unfinished = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
    unfinished.mkdir(parents=True)
    return unfinished


def put_in_place(unfinished: Path, final: Path) -> None:
    """Renames a complete checkpoint to its final name; a damaged one of that name is replaced."""
    _remove(final)
    os.replace(unfinished, final)
    sync_folder(final.parent)


def remove_superfluous(folder: Path, step: int, keep: int) -> None:
    """Removes all checkpoints but that of `step` and the newest older ones, `keep` in all."""
    older = [other for other in _steps(folder) if other < step]
    kept = {step, *older[: max(keep, 1) - 1]}
    for other in _steps(folder):
        if other not in kept:
            _remove(folder / f"step-{other:06d}")


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, or None if there are no checkpoints.

    Skips damaged ones with a warning. Removes partially written ones of a killed process.

    Raises:
        StateError: every checkpoint is damaged.
    """
    if not folder.is_dir():
        return None
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = _steps(folder)
    for step in steps:
        path = folder / f"step-{step:06d}"
        try:
            return _read(path)
        except Exception as error:  # a damaged file can fail in any way inside the parsers
            log.warning("checkpoint %s is damaged (%s); using the previous one", path, error)
    if steps:
        raise StateError(f"every checkpoint in {folder} is damaged; delete that folder to restart the run")
    return None


def unflatten_paths(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[Any, Any]:
    """An optimizer's "state" from release 0.2: tensors of any shape and plain values by path, with digits for ints."""
    state: dict[Any, Any] = {}
    for path, value in {**tensors, **values}.items():
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return state


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    sums = {}
    for part in PARTS:
        tensors = {name: tensor.contiguous() for name, tensor in getattr(checkpoint, part).items()}
        data = format_safetensors(tensors, {"format": "pt"})
        sums[f"{part}.safetensors"] = hashlib.sha256(data).hexdigest()
        _write_synced(folder / f"{part}.safetensors", data)
    write_facts(folder, checkpoint, sums, FORMAT)


def write_facts(folder: Path, checkpoint: Checkpoint, sums: Mapping[str, str], layout: str) -> None:
    """Writes `state.json`, which makes the checkpoint in `folder` complete.

    Args:
        sums: SHA-256 of each of its files, by name.
        layout: `FORMAT` or `SHARDED`.
    """
    facts = {"format": layout, "step": checkpoint.step, "sha256": dict(sums), "facts": dict(checkpoint.facts)}
    facts["self"] = _digest(facts)
    _write_synced(folder / "state.json", json.dumps(facts, indent=2).encode())
    sync_folder(folder)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path) -> Checkpoint:
    state, contents = _read_verified(folder)
    if state["format"] == SHARDED:
        return Checkpoint(state["step"], {}, {}, {}, state["facts"], folder)
    lora, teacher, optimizer = (parse_safetensors(contents[f"{part}.safetensors"]) for part in PARTS)
    return Checkpoint(state["step"], lora, teacher, optimizer, state["facts"])


def _read_verified(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The state and the contents of the files; of shards, which may be large, only the checksums are compared."""
    state = _read_state(folder)
    if state["format"] == SHARDED:
        for name, stated in state["sha256"].items():
            if file_digest(folder / name) != stated:
                raise ValueError(f"{name} was changed")
        return state, {}
    contents = {}
    for name in (f"{part}.safetensors" for part in PARTS):
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != state["sha256"][name]:
            raise ValueError(f"{name} was changed")
    return state, contents


def _read_state(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "state.json").read_bytes())
    stated = state.pop("self")
    if state["format"] not in _READABLE or stated != _digest(state):
        raise ValueError(f"state.json was changed, or its format is not {' or '.join(_READABLE)}")
    if folder.name != f"step-{state['step']:06d}":
        raise ValueError(f"state.json is of step {state['step']}")
    return state


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def read_checkpoint_lora(folder: Path) -> dict[str, Tensor]:
    """The student's raw tensors, fp32, from a checkpoint's folder; for LoRA [rank, in] and [rows, rank]."""
    return parse_safetensors((folder / "lora.safetensors").read_bytes())


def is_whole(folder: Path) -> bool:
    """Whether there is an intact checkpoint in the folder."""
    try:
        _read_verified(folder)
    except Exception:  # any failure to read is the answer
        return False
    return True


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    """The steps that have a folder, newest first."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint atomically: a kill leaves no partial one under its name."""
    if folder.exists():
        away = folder.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
        os.replace(folder, away)
        shutil.rmtree(away, ignore_errors=True)
