"""Checkpoints of the training scripts: one safetensors file per worker in a folder per step, and a log in JSON.

A step's folder counts once every worker's file is in it, so that a run that ends while it saves resumes from the save
before. All files of a step are read on resuming, so the number of workers may change.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from ...files.atomic import write_atomic
from .twins import Twins

SAVE_SECONDS = 100.0
_COMPLETE = "complete.json"


class Checkpoints:
    """The saves of one stage below `folder / stage`; `SAVE_SECONDS` apart, the newest two are kept."""

    def __init__(self, folder: Path, stage: str, twins: Twins) -> None:
        self.folder, self.twins, self.saved = folder / stage, twins, time.monotonic()

    def newest(self) -> Path | None:
        """The folder of the newest complete save."""
        done = sorted(path.parent for path in self.folder.glob(f"step_*/{_COMPLETE}"))
        return done[-1] if done else None

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(steps done, tensors of all workers in their saved shapes) of the newest complete save."""
        newest = self.newest()
        return None if newest is None else (int(newest.name.removeprefix("step_")), read_tensors(newest))

    def due(self) -> bool:
        """Whether the last save is long enough ago; workers may disagree."""
        return time.monotonic() - self.saved > SAVE_SECONDS

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Saves this worker's tensors, of any shape; called by every worker at the same step."""
        folder = self.folder / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: value.detach().contiguous() for name, value in tensors.items()}
        write_atomic(folder / f"rank_{self.twins.rank}.safetensors", save(own))
        self.twins.barrier()
        if self.twins.rank == 0:
            write_atomic(folder / _COMPLETE, json.dumps({"step": step, "workers": self.twins.world}).encode())
            for old in sorted(self.folder.glob("step_*"))[:-2]:
                shutil.rmtree(old)
        self.saved = time.monotonic()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all workers' files of one save, in their saved shapes."""
    return {
        name: value for path in sorted(folder.glob("rank_*.safetensors")) for name, value in load_file(path).items()
    }


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors, of any shape, whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, of any shape, with `prefix` before each name."""
    return {prefix + name: value for name, value in tensors.items()}


def append_log(folder: Path, line: Mapping[str, object]) -> None:
    """Appends one JSON line with the time to `log.jsonl`, and prints it."""
    text = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **line})
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, flush=True)
