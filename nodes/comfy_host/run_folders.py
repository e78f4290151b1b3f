"""The folder of a run, which its settings, model and data determine, also after its steps were raised.

A run of few steps has a shorter warm-up than its settings ask for, and that is in the name of its folder. With more
steps the warm-up is longer, so the run is looked for under the names that fewer steps give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ...dopsd_core.config import TrainConfig, changes_that_forbid_resuming
from ...dopsd_core.training.run_folder import CONFIG_NAME
from ...dopsd_core.training.saved_loras import SavedLora, saved_loras
from .paths import DIGEST_DIGITS, run_folder, shown


def folder_of_run(name: str, config: TrainConfig, digest: Callable[[TrainConfig], str]) -> Path:
    """The folder of the run with this configuration, or of the one with fewer steps that it resumes.

    Args:
        name: start of the folder's name.
        digest: the digits that follow it, for a configuration with another warm-up.

    Raises:
        ValueError: the name is not a valid folder name.
    """
    usual = run_folder(f"{name}-{digest(config)}")
    shorter = {} if (usual / CONFIG_NAME).exists() else dict(_shorter_runs(usual, config))
    if not shorter:
        return usual
    cut = [run_folder(f"{name}-{digest(_with_warmup(config, warmup))}") for warmup in range(config.schedule.warmup)]
    return max((folder for folder in cut if folder in shorter), key=lambda folder: shorter[folder], default=usual)


def _shorter_runs(usual: Path, config: TrainConfig) -> Iterator[tuple[Path, int]]:
    """(folder, steps) of the runs of the same name whose settings differ in nothing but what may be raised."""
    for file in usual.parent.glob(f"*/{CONFIG_NAME}"):
        if file.parent.name[:-DIGEST_DIGITS] == usual.name[:-DIGEST_DIGITS]:
            try:
                other = TrainConfig.from_json(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # damaged
                continue
            if other.steps <= config.steps and not changes_that_forbid_resuming(other, config):
                yield file.parent, other.steps


def _with_warmup(config: TrainConfig, warmup: int) -> TrainConfig:
    return config.replace(schedule=config.schedule.replace(warmup=warmup))


def existing_run(text: str) -> Path:
    """The folder of a run, by its name or path as D-OPSD Train LoRA shows it and gives it.

    Raises:
        ValueError: there is none, or it is elsewhere than in output/dopsd.
    """
    given = PurePosixPath(text.strip().replace("\\", "/"))
    folder = run_folder(given.name)
    places = (".", shown(folder.parent), folder.parent.as_posix())
    if given.parent.as_posix() not in places or folder.is_symlink():
        raise ValueError(f"run_folder {text!r} is not in {shown(folder.parent)}; give the name of a run there")
    if not folder.is_dir():
        raise ValueError(f"there is no run {given.name!r} in {shown(folder.parent)}; connect run_folder, or correct it")
    return folder


def loras_of_run(text: str) -> list[SavedLora]:
    """The LoRA files along the way of the run that `existing_run` finds, in the order of their steps.

    Raises:
        ValueError: there is no such run, or it kept none.
    """
    folder = existing_run(text)
    if found := saved_loras(folder):
        return found
    raise ValueError(
        f"{shown(folder)} has no LoRA files along the way: set save_every in Training Settings before a training, and "
        "disconnect run_folder"
    )
