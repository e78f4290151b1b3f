"""Presets and advanced inputs make the configuration that they say."""

from __future__ import annotations

from typing import Any

import pytest
from inprocess import ComfyUI

NOTHING_CHOSEN: dict[str, Any] = {"seed": 7}


@pytest.fixture
def presets(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.presets")


def make(comfyui: ComfyUI, preset: str, has_anchors: bool = True, family: str = "z_image", **chosen: Any) -> Any:
    kind = comfyui.core("families").get_family(family)
    return comfyui.module("nodes.comfy_host.presets").make_config(
        preset, kind, has_anchors, {**NOTHING_CHOSEN, **chosen}
    )


def flat(comfyui: ComfyUI, preset: str, **chosen: Any) -> dict[str, Any]:
    """The options by flat name."""
    return comfyui.core("options").flattened(make(comfyui, preset, **chosen))


def test_every_preset_is_a_whole_configuration(comfyui: ComfyUI, presets: Any) -> None:
    for name, preset in presets.PRESETS.items():
        options = flat(comfyui, name)
        assert options["steps"] == (preset.steps or 2000)
        for option in ("batch_size", "grad_accumulation", "warmup", "ema_decay", "anchor_probability"):
            assert options[option] == getattr(preset, option), (name, option)
        assert (options["rank"], options["alpha"], options["seed"]) == (preset.rank, preset.alpha, 7)
        assert options["lr"] == (preset.lr or 1e-4)
        assert (options["grad_steps"], options["step_draw"]) == (preset.grad_steps or None, preset.step_draw)


@pytest.mark.parametrize(("family", "lr", "steps"), [("z_image", 1e-4, 2000), ("flux2_klein", 2e-5, 3000)])
def test_paper_is_what_the_authors_ran(comfyui: ComfyUI, family: str, lr: float, steps: int) -> None:
    options = flat(comfyui, "paper", family=family)
    wanted = {
        "rank": 64, "alpha": 128.0, "lr": lr, "steps": steps, "rollout_steps": 4, "ema_decay": 0.9999,
        "max_grad_norm": 1.0, "weight_decay": 0.0, "anchor_probability": 0.0,
    }  # fmt: skip
    assert {name: options[name] for name in wanted} == wanted
    assert options["batch_size"] * options["grad_accumulation"] == 4


def test_aims_come_first_and_the_former_name_stays(comfyui: ComfyUI, presets: Any) -> None:
    schema = comfyui.pack_nodes["DOPSD_TrainLoRA"].define_schema()
    (preset,) = (given for given in schema.inputs if given.id == "preset")
    assert preset.options[:4] == ["subject", "style", "character", "edit"] and "standard" in preset.options
    assert preset.default == presets.USUAL


def test_choices_go_over_the_preset(comfyui: ComfyUI) -> None:
    chosen = {"steps": 5, "lr": 3e-4, "anchor_probability": 0.0, "grad_steps": 2, "ema_decay": 0.5}
    options = flat(comfyui, "standard", **chosen)
    assert {name: options[name] for name in chosen} == chosen


def test_options_of_what_is_not_chosen_are_left_out(comfyui: ComfyUI) -> None:
    chosen = {"objective": "sft", "grad_steps": 2, "loss": "velocity", "teacher": "same", "ema_decay": 0.5}
    config = make(comfyui, "standard", **chosen)
    assert config == make(comfyui, "standard", objective="sft", teacher="same")
    assert config.objective == comfyui.core("objectives").SFT()


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(0, 0.0, 2.0), (8, 0.0, 2.0), (8, 8.0, 1.0), (0, 32.0, 1.0)])
def test_rank_alone_keeps_the_scale(comfyui: ComfyUI, rank: int, alpha: float, scale: float) -> None:
    chosen = {name: value for name, value in {"rank": rank, "alpha": alpha}.items() if value}
    assert make(comfyui, "standard", **chosen).adapter.scale == scale


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("layers.*.attention.*", ("layers.*.attention.*",)),
        (" feed_forward.w1 ,\nfeed_forward.w2,", ("feed_forward.w1", "feed_forward.w2")),
        (
            r"attention.to_q, re:layers\.\d{1,2}\.(attention|feed_forward)\..*, to_v",
            ("attention.to_q", r"re:layers\.\d{1,2}\.(attention|feed_forward)\..*", "to_v"),
        ),
    ],
)
def test_targets_are_separated_by_commas_or_lines(comfyui: ComfyUI, text: str, targets: tuple[str, ...]) -> None:
    assert make(comfyui, "standard", targets=text).adapter.targets == targets


@pytest.mark.parametrize("chosen", [{}, {"targets": ""}, {"targets": " , "}], ids=["none", "empty", "blank"])
@pytest.mark.parametrize("family", ["z_image", "flux2_klein"])
def test_no_targets_are_the_familys(comfyui: ComfyUI, family: str, chosen: dict[str, Any]) -> None:
    config = make(comfyui, "standard", family=family, **chosen)
    assert config.adapter == comfyui.core("families").get_family(family).lora_config(32)


def test_without_prompts_to_anchor_a_preset_anchors_nothing_but_a_choice_stands(comfyui: ComfyUI) -> None:
    assert flat(comfyui, "standard", has_anchors=False)["anchor_probability"] == 0.0
    assert flat(comfyui, "standard", has_anchors=False, anchor_probability=0.3)["anchor_probability"] == 0.3


def test_as_many_grad_steps_as_there_are_means_all(comfyui: ComfyUI) -> None:
    found = [flat(comfyui, "subject", grad_steps=m) for m in (1, 3, 4, 9)]
    assert [(options["grad_steps"], options["step_draw"]) for options in found] == [
        (1, "gap"), (3, "gap"), (None, "uniform"), (None, "uniform")
    ]  # fmt: skip
    assert flat(comfyui, "subject", grad_steps=4, step_draw="gap")["step_draw"] == "gap", "and is reported as unused"


def test_digest_changes_with_what_forbids_resuming_and_with_nothing_else(comfyui: ComfyUI, presets: Any) -> None:
    def digest(*facts: str, **chosen: Any) -> str:
        return presets.run_digest(make(comfyui, "standard", **chosen), *facts)

    same = digest("data", "model")
    assert same == digest("data", "model", steps=900) == digest("data", "model", checkpoint_every=7)
    others = [digest("data", "model", seed=8), digest("data", "model", lr=2e-4), digest("data", "other")]
    others.append(digest("data", "model", targets="to_q"))
    assert len({same, *others}) == 5


def test_runs_of_release_0_2_are_found_again(comfyui: ComfyUI, presets: Any) -> None:
    """Digests as that release made them: a field that came later and is at its default changes nothing."""
    family = comfyui.core("families").Z_IMAGE
    standard = presets.make_config("standard", family, True, {})
    paper = presets.make_config("paper", family, False, {"seed": 7, "rank": 8})
    assert presets.run_digest(standard, "data", "model") == "4f9217d0"
    assert presets.run_digest(paper, "x") == "71582a3f"


@pytest.mark.parametrize(
    ("preset", "has_anchors", "chosen", "digest"),
    [
        (
            "standard",
            True,
            {"objective": "sft", "loss": "velocity", "grad_steps": 2, "anchor_probability": 0.3},
            "0dc344f6",
        ),
        ("demo model", True, {"teacher": "frozen", "rollout_steps": 4, "steps": 120}, "6da86ad1"),
        ("standard", True, {"teacher": "same", "ema_decay": 0.5, "deterministic": True}, "39838f3c"),
        ("paper", False, {"objective": "sft", "teacher": "frozen"}, "052a2d05"),
    ],
)
def test_settings_of_what_is_not_chosen_still_name_a_run(
    comfyui: ComfyUI, presets: Any, preset: str, has_anchors: bool, chosen: dict[str, Any], digest: str
) -> None:
    """Digests as they were made when a configuration listed every field, whatever was chosen."""
    family = comfyui.core("families").Z_IMAGE
    config = presets.make_config(preset, family, has_anchors, chosen)
    settings = presets.merged_settings(preset, family, has_anchors, chosen)
    assert presets.run_digest(config, "data", "model", settings=settings) == digest


def test_deterministic_is_passed_on_and_makes_another_run(comfyui: ComfyUI, presets: Any) -> None:
    absent, off, on = make(comfyui, "standard"), *(make(comfyui, "standard", deterministic=b) for b in (False, True))
    assert absent == off and not off.deterministic and on.deterministic
    assert presets.run_digest(off) == presets.run_digest(absent) != presets.run_digest(on)
