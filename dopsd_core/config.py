"""The configuration of a training run: validated as a whole and saved as JSON next to the LoRA.

config = TrainConfig(steps=300, adapter=Lora(rank=32), optimizer=AdamW(lr=2e-4), teacher=EmaTeacher(decay=0.999))
config == TrainConfig.from_json(config.to_json())

Everything that varies is a choice with its own options, each in one module, and is looked up in a registry. The module
does not import torch, so that an invalid configuration is reported at once.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from .adapters import ADAPTERS, Adapter, Lora
from .families import FAMILIES
from .objectives import DOPSD, OBJECTIVES, Objective
from .old_config import FORMER, is_old, upgraded, without_dropped
from .optimizers import OPTIMIZERS, SCHEDULES, AdamW, Constant, Optimizer, Schedule
from .options import ConfigError, Hint, Options, all_options, flattened
from .teachers import TEACHERS, EmaTeacher, Teacher

__all__ = ["ConfigError", "TrainConfig", "changes_that_forbid_resuming", "resumable_changes"]

_MAY_CHANGE = Hint(most=10_000, may_change=True)


class TrainConfig(Options):
    """Everything that determines a run besides the model and the data."""

    model_config = ConfigDict(validate_default=True)

    family: Annotated[str, Hint(from_host=True)] = Field(
        default="z_image",
        description="model family: sets the rollout grid, the LoRA targets and the key names of the LoRA file",
    )
    steps: Annotated[int, Hint(most=100_000, may_change=True)] = Field(
        default=500, ge=1, description="optimizer steps; may be increased when a run is resumed"
    )
    batch_size: Annotated[int, Hint(most=64)] = Field(
        default=1, ge=1, description="images per forward; all have the same size"
    )
    grad_accumulation: Annotated[int, Hint(most=1024)] = Field(
        default=1, ge=1, description="batches accumulated per optimizer step"
    )
    max_grad_norm: Annotated[float, Hint(step=0.1, most=1000.0)] = Field(
        default=1.0, ge=0, description="maximum gradient norm for clipping; 0 disables clipping"
    )
    rollout_steps: Annotated[int, Hint(most=16)] = Field(
        default=4, ge=1, description="K, the number of sampling steps of the student's rollout"
    )
    caption_dropout: Annotated[float, Hint(step=0.05)] = Field(
        default=0.0, ge=0, le=1, description="probability of replacing a caption by the empty one"
    )
    seed: Annotated[int, Hint(most=0xFFFFFFFFFFFFFFFF)] = Field(
        default=0, ge=0, description="seed of the initial weights, the data order and all noise"
    )
    checkpoint_every: Annotated[int, _MAY_CHANGE] = Field(default=100, ge=1, description="steps between checkpoints")
    keep_checkpoints: Annotated[int, Hint(most=1000, may_change=True)] = Field(
        default=2, ge=1, description="number of latest checkpoints to keep"
    )
    save_every: Annotated[int, _MAY_CHANGE] = Field(
        default=0,
        ge=0,
        description="steps between LoRA files that stay in the run's folder loras, named by step; 0 for none",
    )
    keep_loras: Annotated[int, Hint(most=1000, may_change=True)] = Field(
        default=0,
        ge=0,
        description="number of latest of these files to keep, besides the one with the smallest gap on the unseen "
        "prompt; 0 for all",
    )
    small_first: Annotated[int, Hint(most=100_000)] = Field(
        default=0,
        ge=0,
        description="with several resolutions: steps at the start, which are cheaper, before the largest one joins; "
        "the ones between join evenly. 0 for all from the start",
    )
    stop_at_plateau: Annotated[int, Hint(most=1000, may_change=True)] = Field(
        default=0,
        ge=0,
        description="stop after this many measurements in which the gap on the unseen prompt is not at least 1 % below "
        "its smallest value; 0 to train all steps",
    )
    probe_every: Annotated[int, _MAY_CHANGE] = Field(
        default=25,
        ge=0,
        description="steps between measurements of the gap to the teacher on fixed noise; 0 disables them. The default "
        "adds about 5 % to the forwards",
    )
    probe_pairs: Annotated[int, Hint(most=64)] = Field(
        default=2, ge=1, description="number of training pairs to measure"
    )
    preview_every: Annotated[int, _MAY_CHANGE] = Field(
        default=0,
        ge=0,
        description="steps between preview images, drawn also before the first and after the last step; 0 for none",
    )
    deterministic: bool = Field(
        default=False,
        description="use torch's deterministic algorithms, so that equal runs are bit-identical on a GPU, where the "
        "fastest attention backward sums in arbitrary order; slower, not needed on a CPU",
    )
    activation_offloading: Annotated[bool, Hint(may_change=True)] = Field(
        default=False,
        description="move activations that do not fit on the GPU to RAM between forward and backward instead of "
        "computing them again: more RAM instead of time, same result. For an NVIDIA or AMD GPU with several GB of free "
        "RAM; slower on an H200, the only one measured",
    )
    objective: Annotated[Objective, OBJECTIVES] = Field(default=DOPSD(), description="the training objective")
    adapter: Annotated[Adapter, ADAPTERS] = Field(
        default=Lora(), description="what is trained on top of the frozen network"
    )
    optimizer: Annotated[Optimizer, OPTIMIZERS] = Field(default=AdamW(), description="the optimizer")
    schedule: Annotated[Schedule, SCHEDULES] = Field(default=Constant(), description="learning rate after warm-up")
    teacher: Annotated[Teacher, TEACHERS] = Field(default=EmaTeacher(), description="weights of the teacher")

    @field_validator("family")
    @classmethod
    def _known_family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ConfigError((f"family is {family!r}; choose one of {', '.join(FAMILIES)}",))
        return family

    @field_validator("objective")
    @classmethod
    def _fits_the_rollout(cls, objective: Objective, info: ValidationInfo) -> Objective:
        if problems := objective.problems(info.data["rollout_steps"]) if "rollout_steps" in info.data else ():
            raise ConfigError(problems)
        return objective

    @field_validator("adapter")
    @classmethod
    def _familys_targets(cls, adapter: Adapter, info: ValidationInfo) -> Adapter:
        family = FAMILIES.get(info.data.get("family", ""))
        return adapter if family is None else adapter.for_targets(family.lora_targets)

    @field_validator("adapter")
    @classmethod
    def _fits_files_along_the_way(cls, adapter: Adapter, info: ValidationInfo) -> Adapter:
        if adapter.trains_network and info.data.get("save_every"):
            raise ConfigError(
                (f"save_every keeps LoRA files, and adapter {adapter.name} trains a whole model; set save_every to 0",)
            )
        return adapter

    @field_validator("optimizer")
    @classmethod
    def _fits_the_weights(cls, optimizer: Optimizer, info: ValidationInfo) -> Optimizer:
        adapter = info.data.get("adapter")
        if adapter is not None and adapter.trains_network and optimizer.needs_matrices:
            raise ConfigError(
                (
                    f"optimizer {optimizer.name} trains matrices only, and adapter {adapter.name} trains norms and "
                    "biases too; set optimizer to adamw",
                )
            )
        return optimizer

    @field_validator("schedule")
    @classmethod
    def _warms_up_in_time(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        steps = info.data.get("steps")
        if steps is not None and schedule.warmup >= steps:
            raise ConfigError(
                (f"warmup ({schedule.warmup}) leaves none of the {steps} steps; lower it or raise steps",)
            )
        return schedule

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Parses what `to_json` wrote, also at earlier commits and in release 0.2. Missing options get their defaults.

        Raises:
            ConfigError: options are unknown or invalid; the message lists all of them.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError((f"not JSON: {error}",)) from error
        if not isinstance(fields, dict):
            raise ConfigError((f"a JSON object is needed, this is {type(fields).__name__}",))
        return cls(**(upgraded(fields) if is_old(fields) else without_dropped(fields)))

    def identity(self) -> dict[str, Any]:
        """The options that identify a run, by flat name and JSON-serializable.

        Options added after release 0.2 are included only if they differ from their defaults.
        """
        defaults = {option.name: option.default for option in all_options(TrainConfig) if option.name not in FORMER}
        counted = _counted(self)
        return {name: value for name, value in counted.items() if name not in defaults or value != defaults[name]}

    def learning_rate(self, step: int) -> float:
        """The learning rate of the optimizer step with index `step` (from 0), a function of the step only."""
        return self.schedule.rate(self.optimizer.lr, step, self.steps)


def resumable_changes() -> frozenset[str]:
    """The options that may change when a run is resumed."""
    return frozenset(option.name for option in all_options(TrainConfig) if option.hint.may_change)


def changes_that_forbid_resuming(old: TrainConfig, new: TrainConfig) -> tuple[str, ...]:
    """The differences between `old` and `new` that forbid resuming, as "option: old -> new".

    Warm-ups are compared up to the last step but one of the shorter run: it cannot have a longer one, and its steps may
    be raised.
    """
    before, after = _counted(old), _counted(new)
    longest = min(old.steps, new.steps) - 1
    if min(old.schedule.warmup, longest) == min(new.schedule.warmup, longest):
        after["warmup"] = before["warmup"]
    changed = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    return tuple(f"{name}: {_shown(before, name)} -> {_shown(after, name)}" for name in changed)


def _counted(config: TrainConfig) -> dict[str, Any]:
    """The options by flat name, JSON-serializable, without those that may change when a run is resumed."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flattened(config).items()}
    uncounted = resumable_changes()
    return {name: value for name, value in plain.items() if name not in uncounted}


def _shown(values: dict[str, object], name: str) -> str:
    return repr(values[name]) if name in values else "not set"
