"""Whether a configuration fits the data and the processes, before any work on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import ConfigError, TrainConfig, changes_that_forbid_resuming
from ..denoiser import Denoiser
from ..files.lock import FolderLock
from .checkpoint import saved_facts
from .resume import OTHER_DATA, OTHER_MODEL, require_unchanged, run_exists
from .run_folder import CHECKPOINTS_NAME, check_run_folder
from .training_set import TrainingSet
from .world import World


def check_share(config: TrainConfig, world: World) -> None:
    """Checks that the processes can share the batches of a step.

    Raises:
        ConfigError: they cannot.
    """
    problems = []
    if config.grad_accumulation % world.size:
        problems.append(
            f"grad_accumulation is {config.grad_accumulation}, the number of batches per optimizer step, which "
            f"{world.size} processes cannot share equally; set it to a multiple of {world.size}"
        )
    if world.size > 1 and world.mesh is not None and config.adapter.trains_network:
        together = f"with adapter {config.adapter.name} on {world.size} processes, which hold a part of the model each"
        if config.batch_size > 1:  # a host may run the samples of a batch one by one, others in one forward
            problems.append(f"batch_size is {config.batch_size}; set it to 1 {together}, and raise grad_accumulation")
        if not config.optimizer.takes_parts:
            problems.append(f"optimizer {config.optimizer.name} does not work {together}; choose adamw")
    if problems:
        raise ConfigError(problems)


def check_data(config: TrainConfig, data: TrainingSet) -> None:
    """Checks that the training set has what the configuration needs.

    Raises:
        ConfigError: it has not.
    """
    problems = list(config.objective.data_problems(data.sample(), data.anchors))
    if config.caption_dropout > 0 and any(example.dropped is None for example in data.examples):
        problems.append("caption_dropout is above 0, but no empty caption was encoded; encode one, or set it to 0")
    if problems:
        raise ConfigError(problems)


def idle_settings(config: TrainConfig, has_resolutions: bool) -> list[str]:
    """Settings that have no effect on the run, or keep it from what was asked for, a sentence each.

    has_resolutions: whether there are several.
    """
    remarks = []
    if config.small_first and not has_resolutions:
        remarks.append(f"small_first {config.small_first} is not used: there is only one resolution")
    elif config.small_first >= config.steps:
        remarks.append(
            f"small_first ({config.small_first}) leaves none of the {config.steps} steps for the largest resolution: "
            "lower it or raise steps"
        )
    if config.keep_loras and not config.save_every:
        remarks.append(f"keep_loras {config.keep_loras} is not used: save_every is 0")
    return remarks


def check_network(config: TrainConfig, denoiser: Denoiser, folder: Path, host_bytes: int = 0) -> None:
    """Checks what needs neither the data nor the values of the weights: packages, targets, folder and disk.

    host_bytes: bytes that the host will write into the folder, such as previews.

    Raises:
        ConfigError, DiskError, ValueError: as `trainer.train`.
    """
    config.optimizer.require_packages()
    config.adapter.require_host(denoiser)
    check_run_folder(config, denoiser, folder, host_bytes)


def check_saved_run(
    folder: Path,
    configs: Sequence[TrainConfig],
    model: Callable[[], str],
    resume: bool,
    pairs: Callable[[], str] = lambda: "",
) -> None:
    """Checks by the files of the run in `folder`, if there is one, that it can be resumed, without loading tensors.

    What is known of the dataset only when it is encoded is compared then (`resume.require_same_run`).

    Args:
        folder: folder of the run.
        configs: the configurations that the run may have, depending on the dataset; they differ in few options.
        model: gives the fingerprint of the base model; not called if there is no run.
        resume: whether a run in the folder is to be resumed; if False, it is an error if there is one.
        pairs: gives the `pair_keys.planned_digest` of the dataset, or "" if it is not known; as `model`.

    Raises:
        StateError: it is a different run, or has more steps, or there should be none.
        FolderInUse: another run is using the folder.
    """
    if not folder.is_dir():
        return
    lock = FolderLock(folder)
    if lock.path.exists():
        lock.acquire()
        lock.release()
    if (found := saved_facts(folder / CHECKPOINTS_NAME)) is None:
        return
    if not resume:
        raise run_exists(folder)
    step, facts = found
    saved = TrainConfig.from_json(facts["config"])
    changed = min((changes_that_forbid_resuming(saved, config) for config in configs), key=len)
    if (saved_pairs := facts.get("pairs")) and (pairs() or saved_pairs) != saved_pairs:
        changed = (*changed, OTHER_DATA)
    if facts.get("model", current := model()) != current:
        changed = (*changed, OTHER_MODEL)
    require_unchanged(changed, step, configs[0], folder)
