"""The one configuration of a training run: checked as a whole, written as JSON beside the LoRA.

config = TrainConfig(steps=300, adapter=Lora(rank=32), optimizer=AdamW(lr=2e-4), teacher=EmaTeacher(decay=0.999))
config == TrainConfig.from_json(config.to_json())

Everything that varies is a choice with options of its own, each in one module; this one knows none of them by name.
Imports no torch: what is wrong with a configuration is said at once.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from .adapters import ADAPTERS, Adapter, Lora
from .families import FAMILIES
from .objectives import DOPSD, OBJECTIVES, Objective
from .old_config import FORMER, is_old, upgraded
from .optimizers import OPTIMIZERS, SCHEDULES, AdamW, Constant, Optimizer, Schedule
from .options import ConfigError, Hint, Options, all_options, flattened
from .teachers import TEACHERS, EmaTeacher, Teacher

__all__ = ["ConfigError", "TrainConfig", "changes_that_forbid_resuming", "resumable_changes"]

_MAY_CHANGE = Hint(most=10_000, may_change=True)


class TrainConfig(Options):
    """Everything that decides a run besides the model and the data."""

    model_config = ConfigDict(validate_default=True)

    family: Annotated[str, Hint(from_host=True)] = Field(
        default="z_image",
        description="model family: grid of the rollout, targets, names in the LoRA file",
    )
    steps: Annotated[int, Hint(most=100_000, may_change=True)] = Field(
        default=500, ge=1, description="optimizer steps; may be raised when a run is resumed"
    )
    batch_size: Annotated[int, Hint(most=64)] = Field(
        default=1, ge=1, description="images in one forward; they are of one size"
    )
    grad_accumulation: Annotated[int, Hint(most=1024)] = Field(
        default=1, ge=1, description="batches that make one optimizer step together"
    )
    max_grad_norm: Annotated[float, Hint(step=0.1, most=1000.0)] = Field(
        default=1.0, ge=0, description="largest norm of the gradient, which is clipped to it; 0 for no limit"
    )
    rollout_steps: Annotated[int, Hint(most=16)] = Field(
        default=4, ge=1, description="K, the few steps that the student takes in training"
    )
    caption_dropout: Annotated[float, Hint(step=0.05)] = Field(
        default=0.0, ge=0, le=1, description="share of visits to an image that use an empty caption"
    )
    seed: Annotated[int, Hint(most=0xFFFFFFFFFFFFFFFF)] = Field(
        default=0, ge=0, description="decides the start of the weights, the order of the data and all noise"
    )
    checkpoint_every: Annotated[int, _MAY_CHANGE] = Field(default=100, ge=1, description="steps between checkpoints")
    keep_checkpoints: Annotated[int, Hint(most=1000, may_change=True)] = Field(
        default=2, ge=1, description="how many of the last checkpoints are kept"
    )
    probe_every: Annotated[int, _MAY_CHANGE] = Field(
        default=25,
        ge=0,
        description="steps between measurements of the gap to the teacher on fixed noise; 0 for none. At the default "
        "it costs about one forward in twenty",
    )
    probe_pairs: Annotated[int, Hint(most=64)] = Field(default=2, ge=1, description="training pairs that are measured")
    preview_every: Annotated[int, _MAY_CHANGE] = Field(
        default=0,
        ge=0,
        description="steps between preview images, besides one before the first step and after the last; 0 for none",
    )
    deterministic: bool = Field(
        default=False,
        description="use torch's deterministic algorithms, so that equal runs end bit-identical on a GPU too, where "
        "the fastest backward of attention adds in any order; slower, and a CPU needs it not",
    )
    objective: Annotated[Objective, OBJECTIVES] = Field(default=DOPSD(), description="what is learned")
    adapter: Annotated[Adapter, ADAPTERS] = Field(
        default=Lora(), description="what is trained beside the frozen network"
    )
    optimizer: Annotated[Optimizer, OPTIMIZERS] = Field(default=AdamW(), description="how gradients become steps")
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
        """The configuration that `to_json` wrote, also one of release 0.2. Missing options take their defaults.

        Raises:
            ConfigError: unknown options, wrong types or values; all of them are listed.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError((f"not JSON: {error}",)) from error
        if not isinstance(fields, dict):
            raise ConfigError((f"a JSON object is needed, this is {type(fields).__name__}",))
        return cls(**(upgraded(fields) if is_old(fields) else fields))

    def identity(self) -> dict[str, Any]:
        """The options by flat name, JSON-able, that make two runs the same run; those that came after release 0.2 only
        where they are not at their defaults."""
        defaults = {option.name: option.default for option in all_options(TrainConfig) if option.name not in FORMER}
        counted = _counted(self)
        return {name: value for name, value in counted.items() if name not in defaults or value != defaults[name]}

    def learning_rate(self, step: int) -> float:
        """The rate of the optimizer step with index `step` (from 0), a function of nothing else."""
        return self.schedule.rate(self.optimizer.lr, step, self.steps)


def resumable_changes() -> frozenset[str]:
    """The options that may differ when a run is resumed; any other would make it another run."""
    return frozenset(option.name for option in all_options(TrainConfig) if option.hint.may_change)


def changes_that_forbid_resuming(old: TrainConfig, new: TrainConfig) -> tuple[str, ...]:
    """The differences that make `new` another run than `old`, as "option: old -> new"."""
    before, after = _counted(old), _counted(new)
    changed = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    return tuple(f"{name}: {_shown(before, name)} -> {_shown(after, name)}" for name in changed)


def _counted(config: TrainConfig) -> dict[str, Any]:
    """The options by flat name, JSON-able, without those that may differ when a run is resumed."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flattened(config).items()}
    return {name: value for name, value in plain.items() if name not in resumable_changes()}


def _shown(values: dict[str, object], name: str) -> str:
    return repr(values[name]) if name in values else "not set"
