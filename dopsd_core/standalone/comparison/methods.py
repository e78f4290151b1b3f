"""The methods that are compared: a name and training options, and the tables that are made of them.

All start from the demo's settings (`demo_config`), the baselines at learning rates that were best for them in trials on
other concepts; `--tune` finds every method's on development concepts, from the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...config import ConfigError, TrainConfig
from ...demo.settings import demo_config
from ...options import all_options, changed

RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
"""Learning rates that are tried for each method."""

REFERENCE = "dopsd"

UNTOUCHED, TEACHER = "untouched", "teacher"
"""What is scored without training: the model, and what the teacher would draw."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: unique; names files.
        title: in tables.
        options: by flat name, over the demo's settings.
        undistilled: whether the undistilled model is trained; the LoRA is used on the distilled one in any case.
    """

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    undistilled: bool = False

    def config(self, steps: int, seed: int) -> TrainConfig:
        """The configuration of a run, without previews and without the gap, which cost time.

        Raises:
            ConfigError: the options are not valid.
        """
        base = demo_config(seed=seed)
        schedule = base.schedule.replace(warmup=min(base.schedule.warmup, steps - 1))
        return changed(base.replace(steps=steps, probe_every=0, schedule=schedule), self.options)

    def at_rate(self, rate: float) -> Method:
        """The same method at another learning rate."""
        return replace(self, options={**self.options, "lr": rate})


REFERENCES = (Method(UNTOUCHED, "untouched"), Method(TEACHER, "its teacher"))
DOPSD = Method(REFERENCE, "D-OPSD")

METHODS = (
    DOPSD,
    Method("dopsd_paper", "D-OPSD without anchor", {"anchor_probability": 0.0}),
    Method("sft", "SFT", {"objective": "sft", "lr": 3e-4}),
    Method("sft_on_base", "SFT on the undistilled", {"objective": "sft", "lr": 3e-4}, undistilled=True),
    Method("sft_anchor", "SFT with our anchor", {"objective": "sft", "sft_anchor_probability": 0.5}),
    Method("dreambooth", "DreamBooth", {"objective": "dreambooth", "lr": 1e-3}),
    Method("pso", "PSO", {"objective": "pso", "lr": 1e-3}),
    Method("pso_dpo", "PSO, DPO form", {"objective": "pso", "pso_form": "dpo", "lr": 1e-3}),
)
"""The paper's baselines, and our anchor on SFT."""

ABLATIONS = (
    DOPSD,
    Method("states_data", "states: noised images", {"states": "data"}),
    Method("states_teacher", "states: the teacher's", {"states": "teacher"}),
    Method("ground_truth", "target: ground truth", {"regression_target": "ground_truth"}),
    Method("ground_truth_data", "both: SFT on the grid", {"regression_target": "ground_truth", "states": "data"}),
    Method("no_anchor", "no anchor", {"anchor_probability": 0.0}),
    Method("no_anchor_data", "no anchor, noised images", {"anchor_probability": 0.0, "states": "data"}),
    Method("velocity", "velocity loss", {"loss": "velocity"}),
    Method("teacher_frozen", "teacher: frozen", {"teacher": "frozen"}),
    Method("teacher_same", "teacher: the student", {"teacher": "same"}),
    Method("teacher_fast", "teacher: EMA .9", {"ema_decay": 0.9}),
    Method("k1", "K = 1", {"rollout_steps": 1}),
    Method("k4", "K = 4", {"rollout_steps": 4}),
    Method("k8", "K = 8", {"rollout_steps": 8}),
)
"""Each differs from D-OPSD in one thing, or in two where that is said."""

_ONE_BY_GAP: Mapping[str, Any] = {"grad_steps": 1, "step_draw": "gap"}

SPEED = (
    DOPSD,
    Method("m1", "m = 1 of K = 2", {"grad_steps": 1}),
    Method("m1_gap", "m = 1 of K = 2, by gap", _ONE_BY_GAP),
    Method("k1", "K = 1", {"rollout_steps": 1}),
    Method("k4", "K = 4", {"rollout_steps": 4}),
    Method("k4m2", "m = 2 of K = 4", {"rollout_steps": 4, "grad_steps": 2}),
    Method("k4m2_gap", "m = 2 of K = 4, by gap", {"rollout_steps": 4, "grad_steps": 2, "step_draw": "gap"}),
    Method("k4m1", "m = 1 of K = 4", {"rollout_steps": 4, "grad_steps": 1}),
    Method("k4m1_gap", "m = 1 of K = 4, by gap", {"rollout_steps": 4, **_ONE_BY_GAP}),
    Method("teacher_frozen", "teacher: frozen", {"teacher": "frozen"}),
    Method("batch1", "batch 1", {"batch_size": 1}),
    Method("batch2", "batch 2", {"batch_size": 2}),
    Method("batch8", "batch 8", {"batch_size": 8}),
    Method("batch1_m1_gap", "batch 1, m = 1 of K = 2, by gap", {"batch_size": 1, **_ONE_BY_GAP}),
    Method("batch1_k4", "batch 1, K = 4", {"batch_size": 1, "rollout_steps": 4}),
    Method("batch1_k4m1_gap", "batch 1, m = 1 of K = 4, by gap", {"batch_size": 1, "rollout_steps": 4, **_ONE_BY_GAP}),
)
"""Learning per second, or at equal work per FLOP. Accumulation has the gradients of a batch, and its FLOPs."""

ADAPTERS = (
    replace(DOPSD, title="LoRA, rank 16"),
    Method("dora", "DoRA, rank 15", {"adapter": "dora", "rank": 15}),
    Method("lokr", "LoKr, factor 2, rank 32", {"adapter": "lokr", "factor": 2, "rank": 32}),
    Method("lokr8", "LoKr, factor 8, rank 64", {"adapter": "lokr", "factor": 8, "rank": 64}),
)
"""As many parameters each, within 3 %, and the same alpha / rank. Rank 64 keeps the second factor of LoKr in one
piece in the attention."""

PRESETS: Mapping[str, tuple[Method, ...]] = {
    "methods": METHODS,
    "ablations": ABLATIONS,
    "speed": SPEED,
    "adapters": ADAPTERS,
}


def parse_method(text: str) -> Method:
    """A method from "name: option=value, option=value"; `undistilled=true` trains the undistilled model.

    Raises:
        ConfigError: the text has another form, or the options are not valid.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    words = [word.strip() for word in rest.split(",") if word.strip()]
    pairs = [word.partition("=") for word in words if "=" in word]
    if not colon or not name.replace("_", "").isalnum() or len(pairs) != len(words):
        raise ConfigError(
            (f'--method is {text!r}; write "name: option=value, option=value" with a name in a-z, 0-9, _',)
        )
    texts = {key.strip(): value.strip() for key, _, value in pairs}
    if len(texts) < len(pairs):
        raise ConfigError((f"--method {name} has an option twice; keep one",))
    undistilled = texts.pop("undistilled", "false").lower()
    if undistilled not in ("true", "false"):
        raise ConfigError((f"--method {name}: undistilled is {undistilled!r}; write true or false",))
    options = {option.name: option for option in all_options(TrainConfig)}
    values = {key: options[key].from_text(text) if key in options else text for key, text in texts.items()}
    method = Method(name, name.replace("_", " "), values, undistilled == "true")
    method.config(1, 0)
    return method


def chosen_methods(
    preset: str, names: Sequence[str], own: Sequence[str], reference: str = REFERENCE
) -> tuple[Method, ...]:
    """The methods of a preset, or those of them that are named, and own ones as `parse_method`; the reference first.

    Raises:
        ConfigError: a name is unknown or given twice, or own methods are not valid.
    """
    known = {method.name: method for method in PRESETS[preset]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError((f"there is no method {', '.join(unknown)}; choose from {', '.join(known)}",))
    picked = [known[name] for name in known if not names or name in names or name == reference]
    methods = [*picked, *map(parse_method, own)]
    if twice := {m.name for m in methods if sum(m.name == other.name for other in methods) > 1}:
        raise ConfigError((f"the method {', '.join(sorted(twice))} is given twice; choose another name",))
    rows = [text for method in (*REFERENCES, *methods) for text in {method.name, method.title}]
    if lost := [m.name for m in methods[len(picked) :] if rows.count(m.name) + rows.count(m.title) > 2]:
        raise ConfigError((f"--method {lost[0]}: the tables have a row of that name; choose another name",))
    if reference not in (method.name for method in methods):
        listed = ", ".join(dict.fromkeys([*known, *(method.name for method in methods)]))
        raise ConfigError((f"--reference: there is no method {reference!r}; choose from {listed}",))
    return tuple(sorted(methods, key=lambda method: method.name != reference))
