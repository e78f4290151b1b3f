"""LoRA files along the way: one per `save_every` steps in the folder `loras/` of a run, named by step.

Each is an ordinary LoRA file with ModelSpec's header, so it can be copied to where a loader looks for LoRAs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..config import TrainConfig
from ..files.disk import writing
from ..sharing.model_spec import Description, has_diffusers_names, spec_header
from .resume import RunIdentity

LORAS_NAME = "loras"
_NAME = re.compile(r"step-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class SavedLora:
    """A LoRA file of a run.

    Attributes:
        step: optimizer steps done when it was written.
        path: the file.
    """

    step: int
    path: Path


def lora_of_step(run: Path, step: int) -> Path:
    """The file of this step in the run folder `run`, whether it exists or not."""
    return run / LORAS_NAME / f"step-{step:06d}.safetensors"


def saved_loras(run: Path) -> list[SavedLora]:
    """The LoRA files along the way of the run folder `run`, in the order of their steps; empty without any."""
    folder = run / LORAS_NAME
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((SavedLora(int(match[1]), path) for match, path in found), key=lambda saved: saved.step)


def superfluous(steps: Collection[int], keep: int, best: Collection[int]) -> set[int]:
    """The steps whose files are removed: all but the `keep` newest (0 for all) and the best ones."""
    return set(sorted(steps)[:-keep]).difference(best) if keep else set()


def most_files(config: TrainConfig, done: int) -> int:
    """The largest number of files that the steps after `done` add."""
    if not config.save_every or done >= config.steps:
        return 0
    further = config.steps // config.save_every - done // config.save_every + 1  # and one of the last step
    return min(further, config.keep_loras + 2) if config.keep_loras else further


def is_due(config: TrainConfig, step: int, is_last: bool = False) -> bool:
    """Whether a file is written after this step."""
    return config.save_every > 0 and step > 0 and (is_last or step % config.save_every == 0)


def remove_saved(run: Path, after: int) -> None:
    """Removes the files of later steps: the run does those steps again.

    Raises:
        DiskError: one cannot be removed.
    """
    for saved in saved_loras(run):
        if saved.step > after:
            with writing(saved.path):
                saved.path.unlink(missing_ok=True)


def facts_of(config: TrainConfig, identity: RunIdentity, step: int) -> dict[str, str]:
    """What a LoRA file's header says of the run and its step."""
    facts = {
        "dopsd_version": __version__,
        "dopsd_dataset": identity.data,
        "dopsd_config": config.to_json(),
        "dopsd_step": str(step),
        "dopsd_objective": config.objective.name,
        "dopsd_family": config.family,
    }
    return facts | ({"dopsd_initial": identity.initial} if identity.initial else {})


def described(facts: Mapping[str, str], keys: Collection[str], run: Path) -> dict[str, str]:
    """The header as Save LoRA writes it, from the run's `facts`; its title is the run's name and the step.

    keys: names of the tensors in the file.
    """
    title = f"{facts.get('dopsd_name') or run.name}, step {facts['dopsd_step']}"
    return spec_header(facts, Description(), title, has_diffusers_names(keys))
