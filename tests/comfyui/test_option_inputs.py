"""Node inputs are made from the core's options: type, default, bounds, tooltip; what the widgets give fits the options.

A new objective and a new optimizer are there without further edits, as in tests/test_new_choice.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
from inprocess import ComfyUI


@pytest.fixture
def inputs(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.option_inputs")


@pytest.fixture
def new_choices(comfyui: ComfyUI) -> Iterator[None]:
    """An objective and an optimizer with one option each, registered."""
    from pydantic import Field

    objectives, optimizers = comfyui.core("objectives"), comfyui.core("optimizers")

    class OneLevel(objectives.Objective):
        name: ClassVar[str] = "one_level"
        summary: ClassVar[str] = "the target from one noise level"
        prefix: ClassVar[str] = "one_"

        level: float = Field(default=0.5, gt=0, le=1, description="the noise level that is trained")

    class SignDescent(optimizers.Optimizer):
        name: ClassVar[str] = "signs"
        summary: ClassVar[str] = "steps of one size"

        momentum: float = Field(default=0.9, ge=0, lt=1, description="share of the last direction that is kept")

    with objectives.OBJECTIVES.registered(OneLevel), optimizers.OPTIMIZERS.registered(SignDescent):
        yield


def options_of(comfyui: ComfyUI) -> list[Any]:
    listed = comfyui.core("options").all_options(comfyui.core("config").TrainConfig)
    return [option for option in listed if not option.hint.from_host]


def widgets(inputs: Any, options: Sequence[Any], **more: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Flat name -> (type, what the page is given of it), through a node's schema."""
    from comfy_api.latest import io

    class Settings(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="T", category="T", inputs=inputs.option_inputs(options, **more), outputs=[])

        @classmethod
        def execute(cls, **values: Any) -> io.NodeOutput:
            return io.NodeOutput()

    return {name: (entry[0], entry[1]) for name, entry in Settings.INPUT_TYPES()["optional"].items()}


def test_every_option_has_its_widget(comfyui: ComfyUI, inputs: Any) -> None:
    options = options_of(comfyui)
    made = widgets(inputs, options, advanced=["seed"])
    assert list(made) == [option.name for option in options]
    for option in options:
        kind, about = made[option.name]
        assert about["tooltip"].startswith(option.help[0].upper() + option.help[1:] + ".")
        assert about.get("advanced", False) == (option.name == "seed")
        if option.choices:
            assert kind == "COMBO" and about["options"] == list(option.choices) and about["default"] == option.default
        elif option.kind in (int, float):
            assert kind == {int: "INT", float: "FLOAT"}[option.kind]
            assert about["min"] <= about["default"] <= about["max"], option.name
    assert made["seed"][1]["max"] == 2**64 - 1 and made["seed"][1]["control_after_generate"] is False
    assert made["lr"][1] | {"tooltip": ""} == {
        "default": 1e-4, "min": 0, "max": 0.1, "step": 1e-6, "round": False, "tooltip": "",
    }  # fmt: skip
    assert made["grad_steps"][1]["default"] == made["grad_steps"][1]["min"] == 0
    assert made["custom_path"][0] == "STRING" and made["custom_options"][1]["default"] == "{}"
    assert made["targets"][0] == "STRING" and made["targets"][1]["default"] == ""


def test_tooltips_say_what_an_option_counts_for_and_what_nothing_stands_for(comfyui: ComfyUI, inputs: Any) -> None:
    tooltips = {name: about["tooltip"] for name, (_, about) in widgets(inputs, options_of(comfyui)).items()}
    assert tooltips["sft_shift"].endswith(" Counts with objective sft.")
    assert tooltips["lr"].endswith(" Counts with optimizer adamw or adamw8bit or adafactor or muon.")
    assert " 0: all of the steps." in tooltips["grad_steps"]
    assert " Empty: all attention and MLP layers of the blocks." in tooltips["targets"]
    assert "ema: a moving average of the student's" in tooltips["teacher"]


def test_the_defaults_of_all_widgets_are_the_default_configuration(comfyui: ComfyUI, inputs: Any) -> None:
    options, flat = comfyui.core("options"), options_of(comfyui)
    config = comfyui.core("config").TrainConfig
    given = {name: about["default"] for name, (_, about) in widgets(inputs, flat).items()}
    used, unused = options.split_unused(config, inputs.option_values(flat, given))
    assert options.changed(config(), used) == config() and unused == ()
    given |= {"grad_steps": 2, "targets": "a, b*", "sft_shift": 2.0}
    used, unused = options.split_unused(config, inputs.option_values(flat, given))
    made = options.changed(config(), used)
    assert made.objective.grad_steps == 2 and made.adapter.targets == ("a", "b*") and unused == ("sft_shift",)


def test_defaults_may_be_those_of_a_preset(comfyui: ComfyUI, inputs: Any) -> None:
    config = comfyui.core("demo.settings").demo_config()
    listed = comfyui.core("options").all_options(comfyui.core("config").TrainConfig, config)
    made = widgets(inputs, [option for option in listed if not option.hint.from_host])
    assert {name: made[name][1]["default"] for name in ("lr", "ema_decay", "batch_size", "warmup")} == {
        "lr": 2e-3, "ema_decay": 0.999, "batch_size": 4, "warmup": 10,
    }  # fmt: skip


def test_a_new_objective_and_a_new_optimizer_are_there(comfyui: ComfyUI, inputs: Any, new_choices: None) -> None:
    made = widgets(inputs, options_of(comfyui))
    assert made["objective"][1]["options"] == ["dopsd", "sft", "dreambooth", "pso", "one_level"]
    assert "one_level: the target from one noise level" in made["objective"][1]["tooltip"]
    kind, about = made["one_level"]
    assert (kind, about["default"], about["min"], about["max"]) == ("FLOAT", 0.5, 0, 1)
    assert about["tooltip"] == "The noise level that is trained. Counts with objective one_level."
    kind, about = made["momentum"]
    assert (kind, about["default"], about["min"], about["max"]) == ("FLOAT", 0.9, 0, 1)
    assert about["tooltip"] == "Share of the last direction that is kept. Counts with optimizer signs."
    assert made["optimizer"][1]["options"] == ["adamw", "adamw8bit", "adafactor", "muon", "prodigy", "custom", "signs"]
