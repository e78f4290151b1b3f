"""Checks that a checkpoint belongs to a run, and restores the optimizer's state from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.lora_import import lora_digest
from ..config import TrainConfig, changes_that_forbid_resuming
from ..optimizers.state import resumed_state, unflatten_state
from .checkpoint import Checkpoint, StateError, unflatten_paths
from .pair_keys import digest_of_keys
from .training_set import TrainingSet

OTHER_DATA = (
    "the dataset or how it is read: its images, captions and their order, encoder, trigger, resolutions, repeats, what "
    "the teacher sees or reads, anchor prompts, regularisation"
)
OTHER_MODEL = "the model: its weights or patches"


@dataclass(frozen=True)
class RunIdentity:
    """What identifies a run besides its configuration.

    Attributes:
        data: fingerprint of the training set.
        model: fingerprint of the base model; empty if unknown.
        initial: digest of the LoRA that it started from; empty if there is none.
        class_images: `plan_digest` of the images that the untouched model drew; empty if there are none.
        pairs: `pair_keys.digest_of_keys` of the training set, a part of its fingerprint that is known beforehand.
    """

    data: str
    model: str
    initial: str
    class_images: str = ""
    pairs: str = ""

    def in_words(self) -> dict[str, str]:
        """The digests by what they are of."""
        return {
            "the dataset": self.data,
            "the model": self.model,
            "the initial LoRA": self.initial,
            "the class images": self.class_images,
        }


def identity_of(
    data: TrainingSet, facts: Mapping[str, str], initial: Mapping[str, Tensor] | None, class_images: str
) -> RunIdentity:
    """The identity of a run on `data`.

    Args:
        data: the training set.
        facts: metadata of its LoRA.
        initial: folded tensors of the LoRA to start from, [rank, in] and [rows, rank].
        class_images: digest of the class images.
    """
    start = lora_digest(initial) if initial else ""
    keys = digest_of_keys(data.keys())
    return RunIdentity(data.fingerprint(), facts.get("dopsd_base_fingerprint", ""), start, class_images, keys)


def require_same_run(checkpoint: Checkpoint, config: TrainConfig, identity: RunIdentity, folder: Path) -> None:
    """Checks that the run in `folder`, with this checkpoint, can be resumed.

    Raises:
        StateError: it is a different run (the message lists the differences), or it has more steps.
    """
    facts = checkpoint.facts
    changed = changes_that_forbid_resuming(TrainConfig.from_json(facts["config"]), config)
    if facts["data"] != identity.data:
        changed = (*changed, OTHER_DATA)
    if facts.get("model", identity.model) != identity.model:
        changed = (*changed, OTHER_MODEL)
    if facts.get("initial", "") != identity.initial:
        changed = (*changed, "the LoRA that it started from")
    if facts.get("class_images", "") != identity.class_images:
        changed = (*changed, "the class images: their number, captions, seed or sampling steps")
    require_unchanged(changed, checkpoint.step, config, folder)


def run_exists(folder: Path) -> StateError:
    """The error of a folder that contains a run, where a new one was wanted."""
    return StateError(f"{folder} already contains a run; resume it, or choose another folder")


def require_unchanged(changed: Sequence[str], step: int, config: TrainConfig, folder: Path) -> None:
    """Raises StateError if anything was changed since the run in `folder` was at `step`, or it has more steps."""
    if changed:
        raise StateError(
            f"{folder} contains a different run; choose another folder, or undo what changed: {'; '.join(changed)}"
        )
    if step > config.steps:
        raise StateError(f"{folder} is already at step {step}; raise steps ({config.steps})")


def optimizer_state(checkpoint: Checkpoint, fresh: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's `state_dict()` from a checkpoint, with tensors in their saved shapes.

    fresh: the new optimizer's `state_dict()`, which provides defaults for group options that the saved one lacks.
    """
    facts = checkpoint.facts
    if "optimizer_state" not in facts:  # release 0.2 saved only the state
        return {**fresh, "state": unflatten_paths(checkpoint.optimizer, facts["optimizer"])}
    return resumed_state(fresh, unflatten_state(checkpoint.optimizer, facts["optimizer_state"]))
