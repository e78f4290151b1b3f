"""The folder of a run: lock, log, checkpoints, LoRA file, and the disk space reserved for the next save.

It contains `config.json`, `train.jsonl`, `checkpoints/`, `lora.safetensors` (or, of all weights, `model.safetensors`),
with `save_every` the LoRA files along the way in `loras/`, and for some objectives `class_images/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import TrainConfig
from ..denoiser import Denoiser
from ..families import get_family
from ..files.atomic import write_atomic
from ..files.background import BackgroundWrite
from ..files.disk import DiskError, Reserve, require_room, require_writable, writing
from ..files.lock import FolderLock
from ..memory.footprint import SavedBytes, saved_bytes
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint, saved_steps
from .log import LOG_NAME, RunLog, StepReport, read_log
from .own_files import keep_foreign
from .saved_loras import described, lora_of_step, most_files, remove_saved, saved_loras, superfluous
from .sharded_checkpoint import save_sharded
from .unseen_gap import UNTRAINED, BestStep, best_step
from .world import Peers

CONFIG_NAME = "config.json"
LORA_NAME = "lora.safetensors"
CHECKPOINTS_NAME = "checkpoints"
CLASS_IMAGES_NAME = "class_images"

_SLACK = 4096
"""Maximum difference in bytes between two checkpoints of a run: numbers in their JSON."""

_LOG_BYTES = 10**6
"""Also reserved if possible, for the lines of the log between two saves."""


def check_run_folder(config: TrainConfig, denoiser: Denoiser, folder: Path, host_bytes: int = 0) -> None:
    """Checks before any work on the device that the run can be written to `folder`; leaves nothing behind.

    host_bytes: bytes that the host will write there, such as previews.

    Raises:
        DiskError: the folder is not writable, or there is not enough space for the run.
        ValueError: a target of the LoRA matches nothing.
    """
    require_writable(folder)
    size, steps = _sizes(config, denoiser), saved_steps(folder / CHECKPOINTS_NAME)
    if steps and steps[0] >= config.steps:  # only the LoRA is written again
        require_room(folder, size.lora)
        return
    saves = -(-(config.steps - max(steps, default=0)) // config.checkpoint_every)
    further = max(min(config.keep_checkpoints + 1 - len(steps), saves), 1)  # the oldest is removed after the newest
    loras = 2 + most_files(config, max(steps, default=0))
    require_room(folder, further * size.checkpoint + loras * size.lora + host_bytes)


def saves_in_background(config: TrainConfig, device: torch.device) -> bool:
    """Whether checkpoints are written while the run continues.

    Not on a CPU, where that would take the training's own cores, nor of a whole network, whose optimizer is too large
    to be copied.
    """
    return device.type != "cpu" and not config.adapter.trains_network


class RunFolder:
    """Writes the files of a run.

    The space of one checkpoint and its LoRA files is reserved from `open` on and released only to write them, so that
    no step is lost if other programs fill the disk.
    """

    def __init__(self, path: Path, config: TrainConfig, denoiser: Denoiser) -> None:
        self.path, self._config = path, config
        self._lora_bytes = (size := _sizes(config, denoiser)).lora * (2 if config.save_every else 1)
        self._checkpoint_bytes = size.checkpoint  # replaced by the actual size after the first one
        self._lock = FolderLock(path)
        self._reserve = Reserve(path)
        self._log: RunLog | None = None
        self._checkpoint_step = self._lora_step = -1
        self._background = BackgroundWrite()

    def open(self) -> Checkpoint | None:
        """Locks the folder and reads its newest checkpoint, if there is one.

        Raises:
            DiskError: the folder is not writable.
            FolderInUse: another run is using it.
            StateError: every checkpoint is damaged.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        return load_checkpoint(self.path / CHECKPOINTS_NAME)

    def begin(self, step: int, is_new: bool) -> None:
        """Writes the configuration and opens the log of a run at `step`.

        Raises:
            DiskError: they cannot be written, or there is not enough space for the next save.
        """
        self._checkpoint_step = -1 if is_new else step
        write_atomic(self.path / CONFIG_NAME, self._config.to_json().encode())
        remove_saved(self.path, 0 if is_new else step)
        self._log = RunLog(self.path / LOG_NAME, -1 if is_new else step)
        if step < self._config.steps:
            self.hold_room()

    def close(self) -> None:
        """Waits for the checkpoint in progress, closes the log, and releases reserved space and lock."""
        self._background.wait()
        self._reserve.release()
        if self._log is not None:
            self._log.close()
        self._lock.release()

    def append(self, report: StepReport) -> None:
        """Appends a line to the log."""
        if self._log is None:
            raise RuntimeError("the run is not open")
        self._log.append(report)

    def hold_room(self) -> None:
        """Reserves the space of the next save.

        Raises:
            DiskError: there is not enough space.
        """
        self._background.wait()
        self._hold_room()

    def _hold_room(self) -> None:
        size = self._checkpoint_bytes + self._lora_bytes
        try:
            self._reserve.hold(size + _LOG_BYTES)
        except DiskError:
            self._reserve.hold(size)

    def save_checkpoint(self, checkpoint: Checkpoint, sharing: Peers | None = None) -> Path:
        """Writes a checkpoint, unless there is one of the same step, and returns its folder.

        sharing: the ranks that hold a part of the tensors each, and all call this; None if they are whole.

        Raises:
            DiskError: it could not be written; older ones are untouched.
        """
        self._background.wait()
        self._background.forget_error()  # of an older one
        self._reserve.release()
        if self._log is not None:
            self._log.sync()
        return self._write(checkpoint, sharing)

    def begin_checkpoint(self, checkpoint: Checkpoint, in_background: bool = True) -> None:
        """As `save_checkpoint`, and reserves the space of the next save; by default in a thread, from copies.

        A kill meanwhile leaves what it leaves during any save: the checkpoint before, whole, and the log.

        Raises:
            DiskError: this one, or the one begun before, could not be written; in a thread only by `require_saved`.
        """
        self._background.wait()
        self.require_saved()
        if not in_background:
            self.save_checkpoint(checkpoint)
            self._hold_room()
            return
        self._reserve.release()
        if self._log is not None:
            self._log.sync()
        copied = checkpoint.copied()

        def write() -> None:
            self._write(copied)
            self._hold_room()

        self._background.start(write)

    def require_saved(self) -> None:
        """Raises DiskError if a checkpoint that `begin_checkpoint` began could not be written; does not wait."""
        self._background.raise_error()

    def _write(self, checkpoint: Checkpoint, sharing: Peers | None = None) -> Path:
        folder, keep = self.path / CHECKPOINTS_NAME, self._config.keep_checkpoints
        path = save_sharded(folder, checkpoint, keep, sharing) if sharing else save_checkpoint(folder, checkpoint, keep)
        self._checkpoint_step = checkpoint.step
        self._checkpoint_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) + _SLACK
        return path

    def save_lora(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """Writes the student's raw tensors ([rank, in], [rows, rank]) as a LoRA file, once per step.

        A file of that name which the run did not write stays under another name.

        Raises:
            DiskError: it could not be written; an older file is untouched.
        """
        path, family = self.path / self._config.adapter.file_name, get_family(self._config.family)
        if step == self._lora_step:
            return path
        self._background.wait()
        self._reserve.release()
        if self._lora_step < 0:
            keep_foreign(path, metadata)
        self._config.adapter.save(path, tensors, family, metadata)
        self._lora_step = step
        return path

    def save_lora_of_step(
        self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], after: int = 0
    ) -> None:
        """Writes the student's raw tensors ([rank, in], [rows, rank]) as the LoRA file of this step, which stays.

        Removes older ones that are not to be kept. after: as for `best`.

        Raises:
            DiskError: it could not be written; older ones are untouched.
        """
        adapter, family = self._config.adapter, get_family(self._config.family)
        keys = [family.key_prefix + key for key in adapter.exported(tensors)]
        self._background.wait()
        self._reserve.release()
        adapter.save(lora_of_step(self.path, step), tensors, family, described(metadata, keys, self.path))
        saved = saved_loras(self.path)
        steps, reports = [lora.step for lora in saved], self.reports()
        before = [report for report in reports if report.step <= after]  # by another unseen prompt
        best = {found[0] for found in (best_step(before, steps), best_step(reports, steps, after)) if found}
        unwanted = superfluous(steps, self._config.keep_loras, best)
        for lora in saved:
            if lora.step in unwanted:
                lora.path.unlink(missing_ok=True)

    def reports(self) -> list[StepReport]:
        """The reports of the steps so far."""
        return read_log(self.path / LOG_NAME)

    def best(self, after: int = 0) -> BestStep | None:
        """The step with the smallest gap on the unseen prompt: of those with a LoRA file that is better than none, else
        of all measured ones.

        after: only steps after this one; the earlier ones had another unseen prompt.
        """
        reports, paths = self.reports(), {saved.step: saved.path for saved in saved_loras(self.path)}
        kept, every = (best_step(reports, among, after) for among in (paths, None))
        if kept is None or (kept[1] >= UNTRAINED and every and every[1] < UNTRAINED):
            kept = every
        return BestStep(*kept, paths.get(kept[0])) if kept else None

    def kept(self) -> str:
        """What is saved of the run, as the end of a sentence."""
        self._background.wait()
        kept = f"the run resumes at step {self._checkpoint_step}" if self._checkpoint_step >= 0 else "no step is saved"
        if self._lora_step > self._checkpoint_step:
            adapter = self._config.adapter
            kept += f", and the {adapter.product} of step {self._lora_step} is in {self.path / adapter.file_name}"
        return kept


class UnusedFolder(RunFolder):
    """The folder of a run in a process that neither reads nor writes it, because another one does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> Checkpoint | None:
        """Reads nothing."""
        return None

    def begin(self, step: int, is_new: bool) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def append(self, report: StepReport) -> None:
        """Does nothing."""

    def hold_room(self) -> None:
        """Does nothing."""

    def save_checkpoint(self, checkpoint: Checkpoint, sharing: Peers | None = None) -> Path:
        """The folder of the checkpoint that the other process writes, or all of them if each holds a part."""
        if sharing is not None:
            return save_sharded(self.path / CHECKPOINTS_NAME, checkpoint, 1, sharing)
        return self.path / CHECKPOINTS_NAME / f"step-{checkpoint.step:06d}"

    def begin_checkpoint(self, checkpoint: Checkpoint, in_background: bool = True) -> None:
        """Does nothing."""

    def require_saved(self) -> None:
        """Does nothing."""

    def save_lora(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """The file that the other process writes from the tensors, [rank, in] and [rows, rank]."""
        return self.path / LORA_NAME

    def save_lora_of_step(
        self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], after: int = 0
    ) -> None:
        """Does nothing with the tensors, [rank, in] and [rows, rank]."""

    def reports(self) -> list[StepReport]:
        """None: the other process has them."""
        return []

    def best(self, after: int = 0) -> BestStep | None:
        """None: the other process knows."""
        return None

    def kept(self) -> str:
        """Where the state of the run is, as the end of a sentence."""
        return f"the state of the run is in {self.path}"


def _sizes(config: TrainConfig, denoiser: Denoiser) -> SavedBytes:
    adapter, sites = config.adapter, denoiser.sites()
    parts, elements = adapter.trained(denoiser)
    tensors, derived = adapter.tensors_per_part * parts, adapter.derived_bytes(sites)
    return saved_bytes(elements, tensors, config.teacher, config.optimizer, derived, adapter.file_bytes(elements))
