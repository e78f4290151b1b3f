"""Training Settings shows every option at its real value, fills them in by preset, and Train LoRA takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from graphs import training
from inprocess import ComfyUI


@pytest.fixture
def settings(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.settings")


def filled_widgets(comfyui: ComfyUI, family: str = "Z-Image-Turbo", preset: str = "standard") -> dict[str, Any]:
    """What the page writes into the widgets when this preset is chosen."""
    schema = comfyui.pack_nodes["DOPSD_TrainingSettings"].define_schema()
    table = next(entry for entry in schema.inputs if entry.id == "model_family").extra_dict["dopsd_fill"]
    return dict(table[family][preset])


def test_the_defaults_are_the_first_presets(comfyui: ComfyUI) -> None:
    schema = comfyui.pack_nodes["DOPSD_TrainingSettings"].define_schema()
    shown = {entry.id: entry.default for entry in schema.inputs}
    assert (shown.pop("model_family"), shown.pop("preset")) == ("Z-Image-Turbo", "subject")
    assert shown == filled_widgets(comfyui, preset="subject")
    wanted = {"lr": 1e-4, "rank": 32, "alpha": 64.0, "grad_steps": 1, "step_draw": "gap", "anchor_probability": 0.5}
    assert wanted.items() <= shown.items()


def test_every_option_is_on_one_of_the_two_nodes(comfyui: ComfyUI) -> None:
    offers = comfyui.module("nodes.comfy_host.settings").is_offered
    listed = comfyui.core("options").all_options(comfyui.core("config").TrainConfig, offers=offers)
    shown = {
        entry.id
        for name in ("DOPSD_TrainingSettings", "DOPSD_TrainLoRA", "DOPSD_LoadDataset")
        for entry in comfyui.pack_nodes[name].define_schema().inputs
        if not (entry.extra_dict or {}).get("hidden")
    }
    assert {option.name for option in listed if not option.hint.from_host} <= shown


def test_a_beginner_sees_at_most_nine_widgets(comfyui: ComfyUI) -> None:
    inputs = comfyui.pack_nodes["DOPSD_TrainLoRA"].define_schema().inputs
    seen = [entry.id for entry in inputs if hasattr(entry, "default") and not entry.extra_dict.get("hidden")]
    assert seen == ["run_name", "preset", "steps", "seed", "preview_every", "memory"]


@pytest.mark.parametrize("family", ["Z-Image-Turbo", "FLUX.2-klein", "Krea 2 Turbo"])
@pytest.mark.parametrize("preset", ["subject", "style", "standard", "quick look", "paper"])
@pytest.mark.parametrize("has_anchors", [True, False])
def test_untouched_it_is_the_preset(
    comfyui: ComfyUI, settings: Any, family: str, preset: str, has_anchors: bool
) -> None:
    given = settings.settings_from(family, preset, filled_widgets(comfyui, family, preset))
    assert given.changes == {}
    make = comfyui.module("nodes.comfy_host.presets").make_config
    assert make(preset, given.family, has_anchors, given.changes) == make(preset, given.family, has_anchors, {})


@pytest.mark.parametrize(
    ("widgets", "wanted"),
    [
        ({"rank": 16}, {"rank": 16, "alpha": 64.0}),  # the number that stands there
        ({"warmup": 0}, {"warmup": 0}),
        ({"ema_decay": 0.0}, {"ema_decay": 0.0}),
        ({"anchor_probability": 0.0}, {"anchor_probability": 0.0}),
        ({"grad_steps": 2}, {"grad_steps": 2}),
        ({"rollout_steps": 2}, {"rollout_steps": 2, "grad_steps": None}),
        ({"grad_steps": 0}, {"grad_steps": None}),
        ({"targets": "layers.*.attention.*"}, {"targets": ("layers.*.attention.*",)}),
        ({"objective": "sft", "sft_shift": 1.5}, {"objective": "sft", "sft_shift": 1.5}),
    ],
)
def test_what_is_changed_is_what_is_trained_with(
    comfyui: ComfyUI, settings: Any, widgets: dict[str, Any], wanted: dict[str, Any]
) -> None:
    preset = "demo model" if "warmup" in widgets else "standard"
    shown = filled_widgets(comfyui, preset=preset) | widgets
    given = settings.settings_from("Z-Image-Turbo", preset, shown)
    config = comfyui.module("nodes.comfy_host.presets").make_config(preset, given.family, True, given.changes)
    found = comfyui.core("options").flattened(config)
    assert {name: found[name] for name in wanted} == wanted


ORDER = (
    *("model_family", "preset", "objective", "grad_steps", "loss", "anchor_probability", "sft_sigmas", "sft_shift"),
    *("adapter", "targets", "rank", "alpha", "optimizer", "lr", "weight_decay", "schedule", "warmup", "teacher"),
    *("ema_decay", "batch_size", "grad_accumulation", "max_grad_norm", "rollout_steps", "checkpoint_every"),
    *("keep_checkpoints", "probe_every", "probe_pairs", "deterministic"),
    *("states", "regression_target", "sft_anchor_probability"),
    *("dreambooth_sigmas", "dreambooth_shift", "dreambooth_prior_weight", "dreambooth_class_images", "pso_form"),
    *("pso_beta", "pso_loser_images", "factor", "muon_momentum", "prodigy_lr", "prodigy_weight_decay"),
    *("prodigy_d_coef", "prodigy_safeguard_warmup", "custom_path", "custom_options", "custom_lr"),
)


def test_widgets_stay_in_their_places(comfyui: ComfyUI) -> None:
    """Saved graphs fill them in by position: what is new is at the end."""
    inputs = comfyui.pack_nodes["DOPSD_TrainingSettings"].define_schema().inputs
    assert tuple(entry.id for entry in inputs)[: len(ORDER)] == ORDER


def test_each_option_that_is_changed_is_taken(comfyui: ComfyUI, settings: Any) -> None:
    shown = filled_widgets(comfyui)
    for option in settings.listed_options():
        name, value = option.name, shown[option.name]
        if option.choices:
            other = next(choice for choice in option.choices if choice != value)
        elif option.kind is bool:
            other = not value
        elif option.kind is str or option.is_many:
            other = "x"
        else:
            other = value + 1
        changes = dict(settings.settings_from("Z-Image-Turbo", "standard", {**shown, name: other}).changes)
        if name == "rank":
            assert changes.pop("alpha") == shown["alpha"]
        assert changes == {name: ("x",) if option.is_many else other}, name


def test_what_a_family_has_is_shown(comfyui: ComfyUI, settings: Any) -> None:
    for title, family in settings.FAMILY_TITLES.items():
        shown = filled_widgets(comfyui, title)
        assert shown["targets"] == ", ".join(family.lora_targets) and shown["targets"]
        assert shown["rollout_steps"] == shown["grad_steps"] == family.rollout_steps
    slower = replace(family, rollout_steps=8)
    values = settings.filled("standard", slower)
    assert values["rollout_steps"] == values["grad_steps"] == 8


def with_settings(comfyui: ComfyUI, run_name: str, family: str = "Z-Image-Turbo", **widgets: Any) -> dict[str, Any]:
    graph = training(run_name)
    short = {"rank": 4, "alpha": 4.0, "checkpoint_every": 100, "probe_every": 0, "warmup": 1}
    kept = ("model", "conditions", "vae", "run_name", "preset", "steps", "seed", "preview_every", "memory")
    inputs = {name: value for name, value in graph["train"]["inputs"].items() if name in kept}
    shown = filled_widgets(comfyui, family, "demo model") | short | widgets
    graph["settings"] = {
        "class_type": "DOPSD_TrainingSettings",
        "inputs": {"model_family": family, "preset": "demo model", **shown},
    }
    graph["train"]["inputs"] = {**inputs, "preview_every": 0, "steps": 2, "settings": ["settings", 0]}
    return graph


def test_a_training_takes_them(comfyui: ComfyUI) -> None:
    run = comfyui.execute(with_settings(comfyui, "by_settings", lr=1e-3), keep_cache=True)
    assert run.status == "success", run.error
    (folder,) = (comfyui.output / "dopsd").glob("by_settings-*")
    config = comfyui.core("config").TrainConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    assert (config.adapter.rank, config.adapter.scale, config.optimizer.lr, config.steps) == (4, 1.0, 1e-3, 2)
    assert (
        "changed from the preset demo model: " in run.texts("train")[-1]
        and "lr 0.001 instead of 0.002" in run.texts("train")[-1]
    )


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        ({"custom_path": "no_such_pack:Lion"}, "custom_path no_such_pack:Lion cannot be imported"),
        ({"custom_path": "torch.optim:Lion"}, "custom_path torch.optim:Lion cannot be imported"),
        ({"custom_path": "torch.nn:Linear"}, "is not a class of torch.optim.Optimizer"),
        ({"custom_path": "torch.optim:SGD", "custom_options": '{"speed": 2}'}, "does not take lr and custom_options"),
        ({"custom_path": "torch.optim:SGD", "custom_lr": 100.0}, "custom_lr is 100"),
    ],
)
def test_an_optimizer_that_is_not_there_is_refused_when_the_graph_is_queued(comfyui, widgets, sentence) -> None:
    graph = with_settings(comfyui, "custom_refused", optimizer="custom", **widgets)
    run = comfyui.execute(graph)
    assert (
        run.status == "error" and run.error.count(sentence) == 1 and "Training Settings (node settings): " in run.error
    )
    assert not any(event.kind == "executed" for event in run.events)  # nothing is encoded before


def test_an_optimizer_over_a_link_is_checked_by_the_run(comfyui: ComfyUI) -> None:
    check = comfyui.module("nodes.comfy_host.settings").optimizer_problem
    whole = {"path": "torch.optim:SGD", "options": "{}", "lr": 1e-3}
    assert check("custom", whole) is None and check("custom", {**whole, "path": None}) is None
    assert "choose one of adamw, " in check("sgd", whole)


def test_all_of_the_steps_may_be_asked_for(comfyui: ComfyUI) -> None:
    """0 on the widget, which is no number of steps."""
    run = comfyui.execute(with_settings(comfyui, "all_steps", grad_steps=0), keep_cache=True)
    assert run.status == "success", run.error
    assert "grad_steps" not in run.texts("train")[-1]


def test_what_they_replace_is_named(comfyui: ComfyUI) -> None:
    graph = with_settings(comfyui, "both")
    graph["train"]["inputs"] |= {"preset": "paper", "rank": 8}
    run = comfyui.execute(graph, keep_cache=True)
    assert run.status == "success", run.error
    text = run.texts("train")[-1]
    assert "rank 8 is not used: Training Settings is connected" in text
    assert "the preset paper is not used: Training Settings has demo model" in text
    (folder,) = (comfyui.output / "dopsd").glob("both-*")
    config = comfyui.core("config").TrainConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    assert (config.adapter.rank, config.optimizer.lr) == (4, 2e-3)  # paper's learning rate is another


def test_settings_for_another_family_are_refused(comfyui: ComfyUI) -> None:
    run = comfyui.execute(with_settings(comfyui, "another_family", "FLUX.2-klein"), keep_cache=True)
    assert run.status == "error"
    assert "filled in for FLUX.2-klein, and Z-Image-Turbo is trained: choose Z-Image-Turbo" in run.error
    assert not list((comfyui.output / "dopsd").glob("another_family-*"))


def test_the_same_run_by_old_inputs_and_by_settings(comfyui: ComfyUI) -> None:
    """A run of a saved graph is resumed when its settings move to the new node."""
    old = {
        "rank": 4,
        "alpha": 4.0,
        "learning_rate": 1e-3,
        "warmup": 1,
        "probe_every": 0,
        "preview_every": 0,
        "steps": 2,
    }
    first = comfyui.execute(training("moved", **old), keep_cache=True)
    second = comfyui.execute(with_settings(comfyui, "moved", lr=1e-3), keep_cache=True)
    assert first.status == second.status == "success", (first.error, second.error)
    assert len(list((comfyui.output / "dopsd").glob("moved-*"))) == 1
