"""The one configuration of a training run: checked as a whole, written as JSON beside the LoRA.

config = TrainConfig(family="z_image", steps=300, lora=get_family("z_image").lora_config(rank=16))
config == TrainConfig.from_json(config.to_json())
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from .adapters.adapter_set import TeacherKind
from .adapters.lora_config import LoraConfig
from .families import FAMILIES
from .objectives import DOPSD, OBJECTIVES, SFT, LossForm, Objective, SigmaDistribution

Schedule = Literal["constant", "cosine"]
OptimizerName = Literal["adamw", "adamw8bit"]

RESUMABLE_CHANGES = frozenset({"steps", "checkpoint_every", "keep_checkpoints", "preview_every", "probe_every"})
"""Fields that may differ when a run is resumed; any other would make it another run."""

_ADDED = frozenset({"deterministic"})
"""Fields that release 0.2 did not have. At their defaults they are no part of a run's identity, so that its runs are
still found."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists everything wrong with it."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        listing = "\n".join(f"- {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem{'s' * (len(problems) != 1)} in the configuration:\n{listing}")
        self.problems = problems

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return ConfigError, (self.problems,)  # so that it survives the way out of a worker process


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run besides the model and the data. Raises ConfigError when made wrong.

    Attributes:
        lora: rank, alpha and targets.
        family: model family: the grid of the rollout and the names in the LoRA file.
        objective: "dopsd", or "sft" (plain supervised fine-tuning, the baseline).
        steps: optimizer steps.
        lr: learning rate after warm-up.
        schedule: "constant", or "cosine" towards 0 at the last step.
        warmup: steps over which the learning rate rises from 0.
        batch_size: pictures of one bucket in a forward.
        grad_accumulation: such batches in an optimizer step.
        clip: largest gradient norm; 0 for no limit.
        rollout_steps: K, the student's own few steps.
        grad_steps: m of the K steps that get a loss, drawn at random; None for all.
        loss: "x0" (converges faster) or "velocity" (as printed in the paper).
        teacher: "ema" of the student, the "frozen" base, or the "same" weights.
        ema_decay: of the "ema" teacher, per optimizer step.
        anchor_probability: share of batches that hold ordinary prompts at the base (prior anchor). On by default: on
            the demo it is what keeps the concept out of prompts that do not name it (docs/demo-model.md).
        caption_dropout: share of visits with an empty caption.
        optimizer: "adamw", or "adamw8bit" (needs bitsandbytes).
        weight_decay: of AdamW, decoupled.
        sft_sigmas, sft_shift: how "sft" draws its noise levels.
        seed: of the LoRA's start, the order of the data and all noise.
        checkpoint_every: steps between checkpoints; keep_checkpoints: how many of the last ones stay.
        probe_every: steps between measurements of the gap on fixed noise; 0 for none. probe_pairs: training pairs
            in it. The defaults cost about one forward in twenty.
        preview_every: steps between previews, besides one before the first step and one after the last; 0 for none.
        deterministic: use torch's deterministic algorithms, so that equal runs end bit-identical on a GPU too, where
            the fastest backward of attention adds in any order. Slower; a CPU needs it not.
    """

    lora: LoraConfig
    family: str = "z_image"
    objective: str = "dopsd"
    steps: int = 500
    lr: float = 1e-4
    schedule: Schedule = "constant"
    warmup: int = 0
    batch_size: int = 1
    grad_accumulation: int = 1
    clip: float = 1.0
    rollout_steps: int = 4
    grad_steps: int | None = None
    loss: LossForm = "x0"
    teacher: TeacherKind = "ema"
    ema_decay: float = 0.9999
    anchor_probability: float = 0.5
    caption_dropout: float = 0.0
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    sft_sigmas: SigmaDistribution = "logit-normal"
    sft_shift: float = 3.0
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    probe_every: int = 25
    probe_pairs: int = 2
    preview_every: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError with every problem and its remedy; does nothing for a good configuration."""
        problems = _type_problems(self)
        if not problems:
            problems = [*_choice_problems(self), *_range_problems(self), *_joint_problems(self)]
        if problems:
            raise ConfigError(tuple(problems))

    def to_json(self) -> str:
        """Indented JSON with every field; `from_json` reads it back to an equal configuration."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The configuration that `to_json` wrote. Missing fields take their defaults, except `lora`.

        Raises:
            ConfigError: unknown fields, wrong types or values; all of them are listed.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError((f"not JSON: {error}",)) from error
        if not isinstance(fields, dict):
            raise ConfigError((f"a JSON object is needed, this is {type(fields).__name__}",))
        problems = _unknown_fields(fields, cls, "")
        known = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
        try:
            known["lora"] = _lora_from(fields.get("lora"))
        except ConfigError as error:
            problems += error.problems
            known["lora"] = LoraConfig(targets=("*",))  # stands in so that the other fields are checked too
        try:
            config = cls(**known)
        except ConfigError as error:
            problems += error.problems
        else:
            if not problems:
                return config
        raise ConfigError(tuple(problems))

    def identity(self) -> dict[str, Any]:
        """The fields, JSON-able, that make two runs the same run."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in json.loads(self.to_json()).items()
            if name not in RESUMABLE_CHANGES and not (name in _ADDED and value == defaults[name])
        }

    def make_objective(self) -> Objective:
        """The objective with its options."""
        if self.objective == "sft":
            return SFT(sigmas=self.sft_sigmas, shift=self.sft_shift)
        return DOPSD(grad_steps=self.grad_steps, loss=self.loss, anchor_probability=self.anchor_probability)

    def idle_fields(self) -> tuple[str, ...]:
        """Fields that are set but change nothing under this objective; worth a word to the user."""
        idle = {"sft": ("grad_steps", "loss", "anchor_probability"), "dopsd": ("sft_sigmas", "sft_shift")}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return tuple(name for name in idle.get(self.objective, ()) if getattr(self, name) != defaults[name])


def changes_that_forbid_resuming(old: TrainConfig, new: TrainConfig) -> tuple[str, ...]:
    """The differences that make `new` another run than `old`, as "field: old -> new"."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    changed = [name for name in before if before[name] != after[name] and name not in RESUMABLE_CHANGES]
    return tuple(f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed)


def _type_problems(config: TrainConfig) -> list[str]:
    kinds: Mapping[str, tuple[type, ...]] = {
        "int": (int,),
        "int | None": (int, type(None)),
        "float": (int, float),
        "bool": (bool,),
    }
    problems = []
    for field in dataclasses.fields(config):
        value, declared = getattr(config, field.name), str(field.type)
        allowed = {"LoraConfig": (LoraConfig,)}.get(declared) or kinds.get(declared, (str,))
        if isinstance(value, bool) != (declared == "bool") or not isinstance(value, allowed):
            wanted = {
                "int": "a whole number",
                "int | None": "a whole number or null",
                "float": "a number",
                "bool": "true or false",
            }
            problems.append(f"{field.name} is {value!r}, it must be {wanted.get(declared, 'text')}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{field.name} is {value!r}, it must be a finite number")
    return problems


def _choice_problems(config: TrainConfig) -> list[str]:
    hints = get_type_hints(TrainConfig)
    choices = {name: get_args(hint) for name, hint in hints.items() if getattr(hint, "__origin__", None) is Literal}
    choices |= {"family": tuple(FAMILIES), "objective": tuple(OBJECTIVES)}
    return [
        f"{name} is {getattr(config, name)!r}; choose one of {', '.join(allowed)}"
        for name, allowed in choices.items()
        if getattr(config, name) not in allowed
    ]


def _range_problems(config: TrainConfig) -> list[str]:
    minima: Mapping[str, float] = {
        **dict.fromkeys(("steps", "batch_size", "grad_accumulation", "rollout_steps"), 1),
        **dict.fromkeys(("checkpoint_every", "keep_checkpoints", "probe_pairs"), 1),
        **dict.fromkeys(("warmup", "clip", "weight_decay", "seed", "probe_every", "preview_every"), 0),
    }
    problems = [
        f"{name} is {getattr(config, name)}; set it to at least {least}"
        for name, least in minima.items()
        if getattr(config, name) < least
    ]
    for name in ("lr", "sft_shift"):
        if not getattr(config, name) > 0:
            problems.append(f"{name} is {getattr(config, name)}; set it above 0")
    for name in ("ema_decay", "anchor_probability", "caption_dropout"):
        if not 0 <= getattr(config, name) <= 1:
            problems.append(f"{name} is {getattr(config, name)}; set it within 0 and 1")
    return problems


def _joint_problems(config: TrainConfig) -> list[str]:
    problems = []
    if config.lr > 0.1:
        problems.append(f"lr is {config.lr}: that destroys any model; the paper uses 1e-4")
    if config.grad_steps is not None and not 1 <= config.grad_steps <= config.rollout_steps:
        problems.append(
            f"grad_steps is {config.grad_steps}; set it within 1 and rollout_steps ({config.rollout_steps}), "
            "or null for all of them"
        )
    if config.warmup >= config.steps >= 1:
        problems.append(f"warmup ({config.warmup}) leaves none of the {config.steps} steps; lower it or raise steps")
    return problems


def _unknown_fields(given: Mapping[str, Any], cls: type, prefix: str) -> list[str]:
    known = [field.name for field in dataclasses.fields(cls)]
    problems = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else "; remove it"
            problems.append(f"there is no field {prefix}{name}{hint}")
    return problems


def _lora_from(given: Any) -> LoraConfig:
    if not isinstance(given, dict):
        raise ConfigError(("lora is missing; give its rank, alpha and targets",))
    problems = _unknown_fields(given, LoraConfig, "lora.")
    known = {name: value for name, value in given.items() if name in LoraConfig.__dataclass_fields__}
    targets = known.get("targets")
    if isinstance(targets, list):
        known["targets"] = tuple(targets)
    try:
        lora = LoraConfig(**known)
    except (TypeError, ValueError) as error:
        problems.append(f"lora: {error}")
    else:
        if not problems:
            return lora
    raise ConfigError(tuple(problems))
