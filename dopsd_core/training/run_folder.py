"""The folder of a run: its lock, log, checkpoints and LoRA file, and the room on the disk that the next save needs.

It holds `config.json`, `train.jsonl`, `checkpoints/` and `lora.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..config import TrainConfig
from ..denoiser import Denoiser
from ..families import get_family
from ..files.atomic import write_atomic
from ..files.disk import DiskError, Reserve, require_room, require_writable, writing
from ..files.lock import FolderLock
from ..memory.footprint import SavedBytes, saved_bytes
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint, saved_steps
from .log import LOG_NAME, RunLog, StepReport

CONFIG_NAME = "config.json"
LORA_NAME = "lora.safetensors"
CHECKPOINTS_NAME = "checkpoints"

_SLACK = 4096
"""Bytes by which two checkpoints of a run may differ: numbers in their JSON."""

_LOG_BYTES = 10**6
"""Held besides where there is room, for the lines of the log between two saves."""


def check_run_folder(config: TrainConfig, denoiser: Denoiser, folder: Path, host_bytes: int = 0) -> None:
    """Checks before any work on the device that the run can be written to `folder`; leaves nothing behind.

    host_bytes: what the host itself will write there, such as previews.

    Raises:
        DiskError: the folder cannot be written, or there is no room for what the run will write.
        ValueError: a target of the LoRA matches nothing.
    """
    require_writable(folder)
    size, steps = _sizes(config, denoiser), saved_steps(folder / CHECKPOINTS_NAME)
    if steps and steps[0] >= config.steps:  # nothing is left to do but to write the LoRA again
        require_room(folder, size.lora)
        return
    saves = -(-(config.steps - max(steps, default=0)) // config.checkpoint_every)
    further = max(min(config.keep_checkpoints + 1 - len(steps), saves), 1)  # the oldest goes after the newest has come
    require_room(folder, further * size.checkpoint + 2 * size.lora + host_bytes)


class RunFolder:
    """What a run writes, and what of it is on the disk.

    The room of one checkpoint and one LoRA file is held from `open` on and given up only to write them, so that a disk
    that others fill up meanwhile costs no step.
    """

    def __init__(self, path: Path, config: TrainConfig, denoiser: Denoiser) -> None:
        self.path, self._config = path, config
        self._lora_bytes = (size := _sizes(config, denoiser)).lora
        self._checkpoint_bytes = size.checkpoint  # of what was written, once there is one
        self._lock = FolderLock(path)
        self._reserve = Reserve(path)
        self._log: RunLog | None = None
        self._checkpoint_step = self._lora_step = -1

    def open(self) -> Checkpoint | None:
        """Takes the folder and reads its newest checkpoint, if there is one.

        Raises:
            DiskError: the folder cannot be written.
            FolderInUse: another run is working in it.
            StateError: there are checkpoints, and every one is damaged.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        return load_checkpoint(self.path / CHECKPOINTS_NAME)

    def begin(self, step: int, is_new: bool) -> None:
        """Writes the configuration down and opens the log of a run that stands at `step`.

        Raises:
            DiskError: they cannot be written, or there is no room for the next save.
        """
        self._checkpoint_step = -1 if is_new else step
        write_atomic(self.path / CONFIG_NAME, self._config.to_json().encode())
        self._log = RunLog(self.path / LOG_NAME, -1 if is_new else step)
        if step < self._config.steps:
            self.hold_room()

    def close(self) -> None:
        """Closes the log and gives room and folder back."""
        self._reserve.release()
        if self._log is not None:
            self._log.close()
        self._lock.release()

    def append(self, report: StepReport) -> None:
        """Adds a line to the log."""
        if self._log is None:
            raise RuntimeError("the run is not open")
        self._log.append(report)

    def hold_room(self) -> None:
        """Takes the room of the next save.

        Raises:
            DiskError: there is not so much left.
        """
        size = self._checkpoint_bytes + self._lora_bytes
        try:
            self._reserve.hold(size + _LOG_BYTES)
        except DiskError:
            self._reserve.hold(size)

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, unless there is one of its step, and gives its folder.

        Raises:
            DiskError: it could not be written; older ones are untouched.
        """
        self._reserve.release()
        if self._log is not None:
            self._log.sync()
        path = save_checkpoint(self.path / CHECKPOINTS_NAME, checkpoint, self._config.keep_checkpoints)
        self._checkpoint_step = checkpoint.step
        self._checkpoint_bytes = sum(file.stat().st_size for file in path.iterdir()) + _SLACK
        return path

    def save_lora(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """Writes the student's raw tensors as a LoRA file, unless this was done for that step.

        Raises:
            DiskError: it could not be written; an older file is untouched.
        """
        path, prefix = self.path / LORA_NAME, get_family(self._config.family).key_prefix
        if step == self._lora_step:
            return path
        self._reserve.release()
        self._config.adapter.save(path, tensors, prefix, metadata)
        self._lora_step = step
        return path

    def kept(self) -> str:
        """What of the run is on the disk, as the end of a sentence."""
        kept = f"the run resumes at step {self._checkpoint_step}" if self._checkpoint_step >= 0 else "no step is kept"
        if self._lora_step > self._checkpoint_step:
            kept += f", and the LoRA of step {self._lora_step} is in {self.path / LORA_NAME}"
        return kept


def _sizes(config: TrainConfig, denoiser: Denoiser) -> SavedBytes:
    parts, elements = config.adapter.size(denoiser.sites())
    return saved_bytes(elements, 2 * parts, config.teacher, config.optimizer)
