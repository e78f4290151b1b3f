"""Options are declared once; what is made of a declaration says the same everywhere."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from dopsd_core.adapters import ADAPTERS
from dopsd_core.config import TrainConfig
from dopsd_core.objectives import DOPSD, OBJECTIVES, SFT
from dopsd_core.optimizers import OPTIMIZERS, SCHEDULES, AdamW, AdamW8bit
from dopsd_core.options import (
    ConfigError,
    Hint,
    Options,
    Registry,
    Variant,
    all_options,
    changed,
    flattened,
    help_rows,
    split_unused,
)
from dopsd_core.teachers import TEACHERS, FrozenTeacher

ROOT = Path(__file__).parent.parent


class Shape(Variant):
    size: int = Field(default=3, ge=1, le=9, description="how large")


class Circle(Shape):
    name: ClassVar[str] = "circle"
    summary: ClassVar[str] = "round"


class Star(Shape):
    name: ClassVar[str] = "star"

    points: Annotated[int | None, Hint(none="five")] = Field(default=None, gt=2, description="how many points")
    kind: Literal["thin", "fat"] = Field(default="fat", description="how it looks")


SHAPES: Registry[Shape] = Registry("shape", Circle, Star)


class Drawing(Options):
    title: str = Field(default="x", description="what it is called")
    colours: tuple[str, ...] = Field(default=(), description="what is used")
    weight: float = Field(default=0.5, gt=0, lt=2, description="how heavy")
    shape: Annotated[Shape, SHAPES] = Field(default=Circle(), description="what is drawn")


def test_options_are_listed_with_everything_declared() -> None:
    options = {option.name: option for option in all_options(Drawing)}
    assert list(options) == ["title", "colours", "weight", "shape", "size", "points", "kind"]
    size, points, kind = options["size"], options["points"], options["kind"]
    assert (size.kind, size.default, str(size.bounds), size.variants) == (int, 3, "from 1 to 9", ("circle", "star"))
    assert points.is_optional and points.facts() == "above 2; default none: five" and points.variants == ("star",)
    assert (kind.choices, kind.setting, kind.help) == (("thin", "fat"), "shape", "how it looks")
    assert options["colours"].is_many and options["weight"].facts() == "above 0 and below 2; default 0.5"
    assert options["shape"].choices == ("circle", "star") and options["shape"].help == "what is drawn. circle: round"


def test_defaults_may_be_those_of_an_instance() -> None:
    drawing = Drawing(title="y", shape=Star(size=7))
    options = {option.name: option for option in all_options(Drawing, drawing)}
    assert (options["title"].default, options["shape"].default, options["size"].default) == ("y", "star", 7)


def test_rows_of_a_help_page() -> None:
    rows = {name: (facts, text) for name, facts, text in help_rows(all_options(Drawing))}
    assert rows["size"] == ("from 1 to 9; default 3", "shape circle, star: how large")
    assert rows["kind"] == ("thin, fat; default fat", "shape star: how it looks")


def test_two_options_of_one_name_are_refused() -> None:
    class Square(Shape):
        name: ClassVar[str] = "square"
        kind: int = Field(default=1, description="another kind of kind")

    with SHAPES.registered(Square), pytest.raises(TypeError, match="two options have the name 'kind'"):
        all_options(Drawing)
    assert list(SHAPES) == ["circle", "star"]


def test_flat_names_go_there_and_back() -> None:
    config = TrainConfig(objective=SFT(shift=2.0), teacher=FrozenTeacher(), optimizer=AdamW8bit(lr=1e-3))
    flat = flattened(config)
    assert (flat["objective"], flat["sft_shift"], flat["lr"]) == ("sft", 2.0, 1e-3) and "ema_decay" not in flat
    assert changed(TrainConfig(), flat) == config


def test_another_choice_keeps_what_both_have() -> None:
    config = TrainConfig(optimizer=AdamW(lr=3e-3, weight_decay=0.1), objective=DOPSD(grad_steps=2))
    assert changed(config, {"optimizer": "adamw8bit"}).optimizer == AdamW8bit(lr=3e-3, weight_decay=0.1)
    assert changed(config, {"objective": "sft", "sft_sigmas": "grid"}).objective == SFT(sigmas="grid")
    assert changed(config, {"grad_steps": None}).objective == DOPSD()
    assert changed(config, {}) == config


def test_an_option_of_what_is_not_chosen_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        changed(TrainConfig(), {"sft_sigmas": "grid", "ema_decay": 0.9, "teacher": "same", "lr": 9, "stpes": 1})
    assert set(caught.value.problems) == {
        "lr is 9; set it above 0 and at most 0.1",
        "sft_sigmas is an option of objective sft, and objective is dopsd; leave it out, or set objective to sft",
        "ema_decay is an option of teacher ema, and teacher is same; leave it out, or set teacher to ema",
        "there is no option stpes; did you mean steps?",
    }


def test_what_a_host_gives_though_it_is_not_chosen_is_named_unless_it_is_the_default() -> None:
    given: dict[str, Any] = {"steps": 5, "objective": "sft", "loss": "velocity", "grad_steps": None, "sft_shift": 2.0}
    used, unused = split_unused(TrainConfig, given)
    assert used == {"steps": 5, "objective": "sft", "sft_shift": 2.0} and unused == ("loss",)


def test_a_registered_variant_is_one_inside_the_with_alone() -> None:
    class Slow(AdamW):
        name: ClassVar[str] = "slow"

    with OPTIMIZERS.registered(Slow):
        assert isinstance(TrainConfig.from_json('{"optimizer": {"name": "slow"}}').optimizer, Slow)
    with pytest.raises(ConfigError, match="optimizer is 'slow'; choose one of adamw, adamw8bit"):
        TrainConfig.from_json('{"optimizer": {"name": "slow"}}')


@pytest.mark.parametrize("option", all_options(TrainConfig), ids=lambda option: option.name)
def test_every_option_is_explained(option: Any) -> None:
    assert len(option.help) > 10 and not option.help.endswith(".")
    assert option.hint.none or not option.is_optional
    if option.kind in (int, float):
        assert option.bounds.low is not None or option.bounds.above is not None, "a widget needs a smallest value"
        assert option.bounds.high is not None or option.hint.most is not None, "a widget needs a largest value"


@pytest.mark.parametrize("registry", [OBJECTIVES, ADAPTERS, OPTIMIZERS, SCHEDULES, TEACHERS], ids=lambda r: r.setting)
def test_every_choice_says_what_it_is(registry: Registry) -> None:
    assert all(variant.summary and variant.name == name for name, variant in registry.items())


def test_nothing_of_it_loads_torch() -> None:
    code = "import sys, dopsd_core.config, dopsd_core.arguments; "
    code += "dopsd_core.arguments.parse_args(['train', 'x', '--output', 'y']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
