"""Whether a configuration fits the data and the processes, before any work on the device."""

from __future__ import annotations

from ..config import ConfigError, TrainConfig
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
