"""Inputs of D-OPSD Train LoRA that the run does not use: one line each, for the node and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...dopsd_core.config import TrainConfig
from ...dopsd_core.data.encoding_plan import plan_encoding
from ...dopsd_core.families import get_family
from ...dopsd_core.objectives import DOPSD, Objective
from ...dopsd_core.options import all_options, split_unused
from ...dopsd_core.training.aims import aim_remarks
from .presets import PRESETS, given_settings, merged_settings, preset_settings
from .sockets import Conditions


def unused_settings(
    preset: str, chosen: Mapping[str, Any], config: TrainConfig, conditions: Conditions, has_vae: bool
) -> tuple[str, ...]:
    """One line for each setting or input that has no effect on this run, and one for changes from the preset.

    Args:
        chosen: as for `make_config`.
        config: the resulting configuration, with the memory plan's changes.
    """
    return (
        *_over_the_preset(preset, chosen, conditions),
        *_of_the_schedule(preset, chosen, config),
        *_of_the_objective(preset, chosen, config, conditions),
        *_of_the_rollout(preset, chosen, config),
        *_of_the_teacher(chosen, config),
        *_of_the_anchors(preset, chosen, config, conditions),
        *_of_previews_and_probe(config, conditions, has_vae),
        *_of_the_data(config, conditions),
    )


def aim_notes(preset: str, conditions: Conditions, objective: Objective) -> list[str]:
    """What does not fit the aim of the preset, one line each; an objective without anchors needs no others."""
    plan = plan_encoding(conditions.pairs, trigger=conditions.trigger)
    own = len(plan.anchors) + len(plan.edit_anchors)
    names_others = len(conditions.data.anchors) > own or not objective.wants_anchors
    view, shown = conditions.teacher, conditions.teacher_image
    return aim_remarks(preset, conditions.pairs, view, shown, names_others=names_others)


def _over_the_preset(preset: str, chosen: Mapping[str, Any], conditions: Conditions) -> Iterator[str]:
    usual, given = preset_settings(preset, conditions.family), given_settings(chosen)
    if "grad_steps" in given and not 0 < (given["grad_steps"] or 0) < given.get(
        "rollout_steps", usual["rollout_steps"]
    ):
        given["grad_steps"] = None
    changed = [name for name in given if name in usual and given[name] != usual[name]]
    if changed:
        changes = (f"{name} {_written(given[name])} instead of {_written(usual[name])}" for name in changed)
        yield f"changed from the preset {preset}: {', '.join(changes)}"


def _written(value: float | str | None) -> str:
    """None is the number of gradient steps, for all of them."""
    return "all" if value is None else value if isinstance(value, str) else f"{value:g}"


def _of_the_schedule(preset: str, chosen: Mapping[str, Any], config: TrainConfig) -> Iterator[str]:
    wanted = given_settings(chosen).get("warmup", PRESETS[preset].warmup)
    if wanted > config.schedule.warmup:
        yield f"warmup {wanted} is cut to {config.schedule.warmup}: the run has {config.steps} steps"


def _of_the_objective(
    preset: str, chosen: Mapping[str, Any], config: TrainConfig, conditions: Conditions
) -> Iterator[str]:
    settings = merged_settings(preset, conditions.family, bool(conditions.data.anchors), chosen)
    _, unused = split_unused(TrainConfig, settings)
    by_preset = preset_settings(preset, conditions.family).keys() - given_settings(chosen).keys()
    own = {option.name for option in all_options(TrainConfig) if option.setting == "objective"}
    for name in unused:
        if name in own and name not in by_preset:
            yield f"{name} has no effect on objective {config.objective.name}"


def _of_the_rollout(preset: str, chosen: Mapping[str, Any], config: TrainConfig) -> Iterator[str]:
    if (chosen.get("grad_steps") or 0) > config.rollout_steps:  # None for all
        yield (
            f"grad_steps {chosen['grad_steps']} is not used: there are {config.rollout_steps} rollout_steps, and all "
            "of them get a loss"
        )
    usual = PRESETS[preset].rollout_steps or get_family(config.family).rollout_steps
    if not config.objective.uses_rollout and chosen.get("rollout_steps", usual) != usual:
        yield (
            f"rollout_steps {config.rollout_steps} is only used by the gap and the previews: the objective is "
            f"{config.objective.name}"
        )


def _of_the_teacher(chosen: Mapping[str, Any], config: TrainConfig) -> Iterator[str]:
    for option in all_options(TrainConfig):
        is_idle = option.setting == "teacher" and config.teacher.name not in option.variants
        if is_idle and chosen.get(option.name):
            yield f"{option.name} {chosen[option.name]:g} is not used: the teacher is {config.teacher.name}"
    if not config.objective.uses_teacher:
        what = config.objective.name if not isinstance(config.objective, DOPSD) else "dopsd with ground_truth"
        yield f"the teacher is only used by the gap and the previews: the objective is {what}"


def _of_the_anchors(
    preset: str, chosen: Mapping[str, Any], config: TrainConfig, conditions: Conditions
) -> Iterator[str]:
    count, share = len(set(conditions.data.anchors)), PRESETS[preset].anchor_probability
    if count and config.objective.wants_anchors:
        return
    if not isinstance(config.objective, DOPSD):
        if count:
            yield f"the {count} prior anchors are not used: the objective is {config.objective.name}"
    elif count:
        yield f"the {count} prior anchors are not used: anchor_probability is 0"
    elif not count and share and "anchor_probability" not in given_settings(chosen):
        yield (
            f"the preset's anchor_probability {share:g} is not used: there are no prior anchors; give anchor_prompts "
            "to Build Teacher Condition"
        )


def _of_previews_and_probe(config: TrainConfig, conditions: Conditions, has_vae: bool) -> Iterator[str]:
    if config.preview_every and not has_vae:
        yield f"preview_every {config.preview_every} is not used: no vae is connected"
    if has_vae and not config.preview_every:
        yield "vae is not used: preview_every is 0"
    if conditions.data.heldout is None and config.probe_every:
        yield "the gap is only measured on training captions: every preview prompt is a training caption"
    if conditions.data.heldout is not None and not config.probe_every:
        yield "the unseen prompt is not measured: probe_every is 0"


def _of_the_data(config: TrainConfig, conditions: Conditions) -> Iterator[str]:
    epoch = sum(example.repeats for example in conditions.data.examples)
    trained = config.steps * config.grad_accumulation * config.batch_size
    if config.objective.anchor_share == 1:  # a remark of its own
        return
    trained = round(trained * (1 - config.objective.anchor_share))
    if trained < epoch:
        yield (
            f"the run is shorter than one epoch: {config.steps} steps are about {trained} samples, one epoch is {epoch}"
        )
