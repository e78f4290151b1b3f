"""Curves and previews of a run in accelerate's trackers, beside the run's own train.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import TrainConfig
from ..data.images import to_tensor
from ..options import flattened
from ..training.log import StepReport

TRACKING_NAME = "tracking"

_PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb"}
_MEASURED = (
    "loss", "relative_gap", "heldout_relative_gap", "lr", "grad_norm", "anchors", "loss_scale", "overflows", "seconds",
    "gpu_gb", "ram_gb",
)  # fmt: skip


def chosen_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers to use; "auto" is tensorboard if it is installed, "none" is none.

    Raises:
        ValueError: one that is named is not installed.
    """
    wanted = [name for name in dict.fromkeys(names) if name not in ("auto", "none")]
    for name in wanted:
        if not _is_installed(name):
            raise ValueError(f"--track {name} needs {_PACKAGES[name]}, which is not installed: pip install {name}")
    return tuple(wanted) or (("tensorboard",) if "auto" in names and _is_installed("tensorboard") else ())


@dataclass(frozen=True, eq=False)
class Tracking:
    """Writes reports and previews to trackers.

    Attributes:
        trackers: accelerate's `GeneralTracker`s.
    """

    trackers: Sequence[Any]

    def begin(self, config: TrainConfig) -> None:
        """Writes the settings of the run."""
        settings = {
            name: value if isinstance(value, int | float) else str(value) for name, value in flattened(config).items()
        }
        for tracker in self.trackers:
            tracker.store_init_configuration(settings)

    def on_step(self, report: StepReport) -> None:
        """Writes all that was measured in a step, and the peak of the GPU's memory."""
        known = {name: getattr(report, name) for name in _MEASURED}
        if torch.cuda.is_available() and report.step:
            known["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        values = {**report.metrics, **{name: value for name, value in known.items() if value is not None}}
        for tracker in self.trackers:
            tracker.log(values, step=report.step)

    def on_preview(self, step: int, sheet: Image.Image) -> None:
        """Writes a preview sheet."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                batch = to_tensor(sheet.convert("RGB"))[None].numpy()
                tracker.log_images({"preview": batch}, step=step, dataformats="NCHW")
            else:
                tracker.log_images({"preview": [sheet]}, step=step)

    def close(self) -> None:
        """Ends the trackers."""
        for tracker in self.trackers:
            tracker.finish()


def open_tracking(names: Sequence[str], folder: Path) -> Tracking:
    """Starts these trackers for the run in `folder`; tensorboard's files are in its folder tracking.

    Raises:
        ValueError: one of them cannot be started; the message says why.
    """
    if not names:
        return Tracking(())
    from accelerate import Accelerator

    place = folder / TRACKING_NAME
    new = [path for path in (place, folder) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)  # W&B writes elsewhere if there is no such folder
        accelerator = Accelerator(log_with=list(names), project_dir=str(place), cpu=_is_cpu_only())
        wandb = {"name": folder.name, "dir": str(place)}
        accelerator.init_trackers("dopsd", init_kwargs={"wandb": wandb} if "wandb" in names else {})
    except Exception as error:  # whatever a service raises without a login or a network
        _remove_empty(new)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--track {' '.join(names)} cannot be started: {reason}") from error
    return Tracking(tuple(accelerator.trackers))


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _is_cpu_only() -> bool:
    return not torch.cuda.is_available()


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(_PACKAGES[name]) is not None
