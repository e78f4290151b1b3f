"""Presets and advanced inputs make the configuration that they say."""

from __future__ import annotations

from typing import Any

import pytest
from inprocess import ComfyUI

NOTHING_CHOSEN: dict[str, Any] = {
    "steps": 0, "rank": 0, "alpha": 0.0, "lr": 0.0, "batch_size": 0, "grad_accumulation": 0, "warmup": 0,
    "ema_decay": 0.0, "anchor_probability": -1.0, "grad_steps": 0, "rollout_steps": 4, "seed": 7,
}  # fmt: skip


@pytest.fixture
def presets(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.presets")


def make(comfyui: ComfyUI, preset: str, has_anchors: bool = True, **chosen: Any) -> Any:
    family = comfyui.core("families").Z_IMAGE
    return comfyui.module("nodes.presets").make_config(preset, family, has_anchors, {**NOTHING_CHOSEN, **chosen})


def test_every_preset_is_a_whole_configuration(comfyui: ComfyUI, presets: Any) -> None:
    for name, preset in presets.PRESETS.items():
        config = make(comfyui, name)
        for field in ("steps", "batch_size", "grad_accumulation", "warmup", "ema_decay", "anchor_probability"):
            assert getattr(config, field) == getattr(preset, field), (name, field)
        assert (config.lora.rank, config.lora.alpha, config.seed) == (preset.rank, preset.alpha, 7)
        assert config.lr == (preset.lr or 1e-4) and config.grad_steps is None


def test_paper_is_what_the_authors_ran(comfyui: ComfyUI) -> None:
    config = make(comfyui, "paper")
    assert (config.lora.rank, config.lora.alpha, config.lr, config.steps) == (64, 128.0, 1e-4, 2000)
    assert (config.rollout_steps, config.ema_decay, config.clip, config.weight_decay) == (4, 0.9999, 1.0, 0.0)
    assert config.batch_size * config.grad_accumulation == 4 and config.anchor_probability == 0.0


def test_choices_go_over_the_preset(comfyui: ComfyUI) -> None:
    config = make(comfyui, "standard", steps=5, lr=3e-4, anchor_probability=0.0, grad_steps=2, ema_decay=0.5)
    assert (config.steps, config.lr, config.anchor_probability) == (5, 3e-4, 0.0)
    assert (config.grad_steps, config.ema_decay) == (2, 0.5)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(0, 0.0, 2.0), (8, 0.0, 2.0), (8, 8.0, 1.0), (0, 32.0, 1.0)])
def test_rank_alone_keeps_the_scale(comfyui: ComfyUI, rank: int, alpha: float, scale: float) -> None:
    assert make(comfyui, "standard", rank=rank, alpha=alpha).lora.scale == scale


def test_without_prompts_to_anchor_a_preset_anchors_nothing_but_a_choice_stands(comfyui: ComfyUI) -> None:
    assert make(comfyui, "standard", has_anchors=False).anchor_probability == 0.0
    assert make(comfyui, "standard", has_anchors=False, anchor_probability=0.3).anchor_probability == 0.3


def test_as_many_grad_steps_as_there_are_means_all(comfyui: ComfyUI) -> None:
    assert [make(comfyui, "standard", grad_steps=m).grad_steps for m in (1, 3, 4, 9)] == [1, 3, None, None]


def test_digest_changes_with_what_forbids_resuming_and_with_nothing_else(comfyui: ComfyUI, presets: Any) -> None:
    def digest(*facts: str, **chosen: Any) -> str:
        return presets.run_digest(make(comfyui, "standard", **chosen), *facts)

    same = digest("data", "model")
    assert same == digest("data", "model", steps=900) == digest("data", "model", checkpoint_every=7)
    others = [digest("data", "model", seed=8), digest("data", "model", lr=2e-4), digest("data", "other")]
    assert len({same, *others}) == 4
