"""The inputs of Training Settings, the values that a preset fills in, and the settings that its widgets make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from comfy_api.latest import io

from ...dopsd_core.adapters import ADAPTERS
from ...dopsd_core.config import TrainConfig
from ...dopsd_core.families import Family
from ...dopsd_core.optimizers import OPTIMIZERS, Custom
from ...dopsd_core.options import ConfigError, Option, Variant, all_options
from .families import all_families
from .option_inputs import option_inputs, option_values, widget_value
from .presets import PRESETS, USUAL, preset_settings


def is_offered(variant: type[Variant]) -> bool:
    """Whether a choice works inside ComfyUI: not one that trains the network's own weights, which are ComfyUI's."""
    return not getattr(variant, "trains_network", False)


OPTIONS: Mapping[str, Option] = {option.name: option for option in all_options(TrainConfig, offers=is_offered)}
"""Every option by flat name."""

_ELSEWHERE = frozenset({"family", "steps", "seed", "preview_every", "caption_dropout"})
"""Options that are on D-OPSD Train LoRA or Load Dataset, or follow from the MODEL."""

_LATER = (
    *("states", "regression_target", "sft_anchor_probability"),
    *("dreambooth_sigmas", "dreambooth_shift", "dreambooth_prior_weight", "dreambooth_class_images"),
    *("pso_form", "pso_beta", "pso_loser_images"),
    *("factor", "muon_momentum", "prodigy_lr", "prodigy_weight_decay", "prodigy_d_coef", "prodigy_safeguard_warmup"),
    *("custom_path", "custom_options", "custom_lr"),
    *("save_every", "keep_loras", "stop_at_plateau", "small_first", "step_draw", "activation_offloading"),
)
"""Options that came after the first version of Training Settings. They are at its end in this order, since saved graphs
fill in widgets by position."""

FAMILY_TITLES: Mapping[str, Family] = {family.title: family for family in all_families()}


@dataclass(frozen=True)
class TrainingSettings:
    """The output of Training Settings.

    Attributes:
        family: the model family that the values were filled in for.
        preset: its name in `PRESETS`.
        changes: options by flat name whose values differ from the preset's.
    """

    family: Family
    preset: str
    changes: Mapping[str, Any]


def listed_options() -> list[Option]:
    """The options on Training Settings: choices with their own options, those of the run, those that came later."""
    shown = [option for name, option in OPTIONS.items() if name not in (*_ELSEWHERE, *_LATER)]
    first = sorted(shown, key=lambda option: not (option.setting or option.choices))
    return [*first, *(OPTIONS[name] for name in _LATER)]


def shown_options() -> list[Option]:
    """The same, with the defaults that Training Settings starts with."""
    usual = filled(USUAL, next(iter(FAMILY_TITLES.values())))
    return [replace(option, default=usual[option.name]) for option in listed_options()]


def filled(preset: str, family: Family) -> dict[str, Any]:
    """The value of every option by flat name with this preset, also of those without effect."""
    defaults = {name: option.default for name, option in OPTIONS.items()}
    values = {**defaults, "targets": family.lora_targets, **preset_settings(preset, family)}
    return {**values, "grad_steps": values["grad_steps"] or values["rollout_steps"]}


def settings_inputs() -> list[Any]:
    """model_family, preset, and a widget per option; the page fills them in when one of the first two changes."""
    first = next(iter(FAMILY_TITLES))
    table = {title: {preset: _widgets(preset, family) for preset in PRESETS} for title, family in FAMILY_TITLES.items()}
    return [
        io.Combo.Input(
            "model_family",
            options=list(FAMILY_TITLES),
            default=first,
            optional=True,
            tooltip="The model that you train. Choosing one fills in its values: learning rate, rollout steps, layers.",
            extra_dict={"dopsd_fill": table},
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=USUAL,
            optional=True,
            tooltip="Fills in all values below with settings that fit together; change them afterwards as you like.",
        ),
        *option_inputs(shown_options()),
    ]


def settings_from(model_family: str, preset: str, widgets: Mapping[str, Any]) -> TrainingSettings:
    """The settings that these widgets show."""
    family = FAMILY_TITLES[model_family]
    usual = filled(preset, family)
    values = option_values(listed_options(), widgets)
    changes = {name: value for name, value in values.items() if value != usual[name]}
    if "rank" in changes:  # alpha is shown as a number, so it must not follow the rank as it does for a preset
        changes["alpha"] = values["alpha"]
    return TrainingSettings(family, preset, changes)


def optimizer_problem(optimizer: str, custom: Mapping[str, Any]) -> str | None:
    """Why an optimizer cannot be used, such as a package that is not installed; None if it can.

    custom: the options of optimizer custom by their own names; None for those that come over a link.
    """
    own = {name: value for name, value in custom.items() if value is not None} if optimizer == Custom.name else {}
    if optimizer == Custom.name and len(own) < len(custom):
        return None  # the run checks them
    try:
        OPTIMIZERS.validated({"name": optimizer, **own}).require_packages()
    except ConfigError as error:
        return "; ".join(error.problems)
    return None


def adapter_problem(adapter: str) -> str | None:
    """Why an adapter cannot be trained here, such as one that a graph from elsewhere names; None if it can."""
    offered = [name for name, variant in ADAPTERS.items() if is_offered(variant)]
    if adapter in offered:
        return None
    if adapter not in ADAPTERS:
        return f"adapter is {adapter!r}; choose one of {', '.join(offered)}"
    return (
        f"adapter {adapter} trains the network's own weights, which ComfyUI may stream or quantise: choose "
        f"{', '.join(offered)}, or train with python -m dopsd_core train --adapter {adapter}"
    )


def _widgets(preset: str, family: Family) -> dict[str, Any]:
    values = filled(preset, family)
    return {option.name: widget_value(option, values[option.name]) for option in listed_options()}
