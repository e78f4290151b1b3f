"""A configuration is checked as a whole, with remedies, and survives JSON."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopsd_core.adapters import Lora
from dopsd_core.config import ConfigError, TrainConfig, changes_that_forbid_resuming
from dopsd_core.families import FLUX2_KLEIN, Z_IMAGE
from dopsd_core.objectives import DOPSD, SFT
from dopsd_core.optimizers import AdamW, AdamW8bit, Constant, Cosine
from dopsd_core.teachers import EmaTeacher, FrozenTeacher

LORA = Lora(rank=4, alpha=8.0, targets=("to_q", "to_k"))


def problems_of(**fields: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**fields)
    return caught.value.problems


@given(
    steps=st.integers(1, 10_000),
    lr=st.floats(1e-8, 0.1),
    decay=st.floats(0, 1),
    m=st.one_of(st.none(), st.integers(1, 4)),
    teacher=st.sampled_from(["ema", "frozen", "same"]),
    seed=st.integers(0, 2**63),
)
def test_json_round_trip(steps: int, lr: float, decay: float, m: int | None, teacher: str, seed: int) -> None:
    whose: Any = EmaTeacher(decay=decay) if teacher == "ema" else teacher
    config = TrainConfig(
        steps=steps, seed=seed, objective=DOPSD(grad_steps=m), adapter=LORA, optimizer=AdamW(lr=lr), teacher=whose
    )
    assert TrainConfig.from_json(config.to_json()) == config


def test_json_has_a_tag_for_each_choice() -> None:
    written = json.loads(TrainConfig(objective=SFT(sigmas="grid"), schedule=Cosine(warmup=3)).to_json())
    assert written["objective"] == {"name": "sft", "sigmas": "grid", "shift": 3.0, "anchor_probability": 0.0}
    assert written["schedule"] == {"name": "cosine", "warmup": 3}
    assert written["adapter"]["targets"] == list(Z_IMAGE.lora_targets)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"steps": 0}, "steps is 0; set it to at least 1"),
        ({"steps": 1.5}, "steps is 1.5, it must be a whole number"),
        ({"steps": True}, "steps is True, it must be a whole number"),
        ({"optimizer": {"name": "adamw", "lr": 0}}, "lr is 0; set it above 0 and at most 0.1"),
        ({"optimizer": {"name": "adamw", "lr": 3.0}}, "lr is 3.0; set it above 0 and at most 0.1"),
        ({"optimizer": {"name": "adamw", "lr": math.nan}}, "lr is nan, it must be a finite number"),
        ({"optimizer": {"name": "adamw", "lr": "1e-4"}}, "lr is '1e-4', it must be a number"),
        (
            {"optimizer": {"lr": 1e-4}},
            "optimizer is None; choose one of adamw, adamw8bit, adafactor, muon, prodigy, custom",
        ),
        ({"optimizer": 3}, 'optimizer is 3; give a name and options, such as {"name": "adamw"}'),
        ({"schedule": "linear"}, "schedule is 'linear'; choose one of constant, cosine"),
        ({"teacher": "none"}, "teacher is 'none'; choose one of ema, frozen, same"),
        ({"teacher": {"name": "ema", "decay": 1.1}}, "ema_decay is 1.1; set it to a value from 0 to 1"),
        ({"teacher": {"name": "frozen", "decay": 0.9}}, "there is no option decay; remove it"),
        ({"objective": "ppo"}, "objective is 'ppo'; choose one of dopsd, sft, dreambooth, pso"),
        ({"objective": {"name": "dopsd", "los": "x0"}}, "there is no option los; did you mean loss?"),
        ({"objective": {"name": "dopsd", "loss": "v"}}, "loss is 'v'; choose one of x0, velocity"),
        (
            {"objective": {"name": "dopsd", "grad_steps": 0}},
            "grad_steps is 0; set it to at least 1, or null for all of the steps",
        ),
        (
            {"objective": DOPSD(grad_steps=5)},
            "grad_steps is 5; set it to a value from 1 to rollout_steps (4), or null for all of the steps",
        ),
        ({"family": "sdxl"}, "family is 'sdxl'; choose one of z_image, flux2_klein, krea2, qwen_image21"),
        ({"family": None}, "family is None, it must be text"),
        ({"caption_dropout": -0.1}, "caption_dropout is -0.1; set it to a value from 0 to 1"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1; set it to at least 0"),
        (
            {"steps": 10, "schedule": Constant(warmup=10)},
            "warmup (10) leaves none of the 10 steps; lower it or raise steps",
        ),
        ({"seed": -1}, "seed is -1; set it to at least 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0; set it to at least 1"),
        ({"stpes": 3}, "there is no option stpes; did you mean steps?"),
        ({"lr": 1e-4}, "lr is an option of the optimizer; write it into that"),
    ],
)
def test_every_mistake_is_named_with_a_remedy(fields: dict[str, Any], sentence: str) -> None:
    assert problems_of(**fields) == (sentence,)


def test_all_mistakes_at_once() -> None:
    problems = problems_of(
        steps=0,
        rollout_steps=2,
        objective=DOPSD(grad_steps=3),
        optimizer={"name": "adamw", "lr": -1.0, "weight_decay": -1.0},
        schedule="x",
        teacher={"name": "ema", "decay": 2.0},
        stpes=1,
    )
    names = ["steps", "grad_steps", "lr", "weight_decay", "schedule", "ema_decay", "there"]
    assert [problem.split()[0] for problem in problems] == names
    assert str(ConfigError(problems)).startswith("7 problems in the configuration:\n- steps is 0;")


def test_mistakes_in_json() -> None:
    fields = json.loads(TrainConfig(adapter=LORA).to_json())
    bad = fields | {"stpes": 3, "batch_size": 0, "adapter": fields["adapter"] | {"rank": 0, "alhpa": 1}}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(json.dumps(bad))
    message = str(caught.value)
    for words in ("did you mean steps?", "did you mean alpha?", "rank is 0; set it to a value from", "batch_size is 0"):
        assert words in message
    deep = "[" * 100_000
    for text, words in (("[]", "JSON object"), ("{", "not JSON"), (deep, "not JSON")):
        with pytest.raises(ConfigError, match=words):
            TrainConfig.from_json(text)
    assert TrainConfig.from_json("{}") == TrainConfig()


def test_targets_are_the_familys_unless_given() -> None:
    assert TrainConfig().adapter == Lora(targets=Z_IMAGE.lora_targets)
    assert TrainConfig(family="flux2_klein", adapter=Lora(rank=2)).adapter == FLUX2_KLEIN.lora_config(rank=2)
    assert TrainConfig(adapter=LORA).adapter is LORA


def test_a_configuration_is_frozen_and_its_changes_are_checked() -> None:
    config = TrainConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3
    assert config.replace(steps=3).steps == 3 and config.steps == 500
    with pytest.raises(ConfigError, match="steps is 0"):
        config.replace(steps=0)
    assert hash(config) == hash(TrainConfig()) and config == TrainConfig() != config.replace(seed=1)


@given(step=st.integers(0, 99), warmup=st.integers(0, 50), kind=st.sampled_from([Constant, Cosine]))
def test_the_rate_rises_then_never_rises_again(step: int, warmup: int, kind: Any) -> None:
    config = TrainConfig(steps=100, optimizer=AdamW(lr=1e-3), schedule=kind(warmup=warmup))
    rate, following = config.learning_rate(step), config.learning_rate(step + 1)
    assert 0 < rate <= 1e-3
    assert (following > rate) if step < warmup else (following <= rate)


def test_the_rate_by_hand() -> None:
    warm = TrainConfig(steps=10, optimizer=AdamW(lr=1.0e-2), schedule=Constant(warmup=3))
    assert [warm.learning_rate(step) for step in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    cosine = TrainConfig(steps=4, optimizer=AdamW(lr=1.0e-2), schedule=Cosine())
    half = math.sqrt(0.5)
    expected = [0.01, 0.005 * (1 + half), 0.005, 0.005 * (1 - half), 0.0]
    assert [cosine.learning_rate(step) for step in range(5)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ((5, 4), (20, 10), ()),
        ((20, 10), (5, 4), ()),
        ((5, 4), (20, 3), ("warmup: 4 -> 3",)),
        ((20, 4), (20, 10), ("warmup: 4 -> 10",)),
        ((20, 4), (30, 10), ("warmup: 4 -> 10",)),
        ((5, 2), (20, 10), ("warmup: 2 -> 10",)),
    ],
)
def test_a_warmup_up_to_the_last_step_may_become_longer_with_the_steps(
    old: tuple[int, int], new: tuple[int, int], changed: tuple[str, ...]
) -> None:
    """old, new: (steps, warmup)."""
    before, after = (TrainConfig(steps=steps, schedule=Constant(warmup=warmup)) for steps, warmup in (old, new))
    assert changes_that_forbid_resuming(before, after) == changed
    assert before.schedule.warmup == old[1]


def test_what_may_change_on_resuming() -> None:
    config = TrainConfig(adapter=LORA)
    free = config.replace(steps=900, checkpoint_every=7, keep_checkpoints=5, probe_every=0, preview_every=1)
    assert changes_that_forbid_resuming(config, free) == () and config.identity() == free.identity()
    assert json.loads(json.dumps(config.identity())) == config.identity()
    other = config.replace(
        max_grad_norm=2.0, adapter=LORA.replace(rank=8), optimizer=AdamW8bit(), teacher=FrozenTeacher()
    )
    assert changes_that_forbid_resuming(config, other) == (
        "max_grad_norm: 1.0 -> 2.0",
        "rank: 4 -> 8",
        "optimizer: 'adamw' -> 'adamw8bit'",
        "teacher: 'ema' -> 'frozen'",
        "ema_decay: 0.9999 -> not set",
    )


def test_the_leaner_optimizer_is_the_same_otherwise() -> None:
    assert AdamW(lr=3e-4, weight_decay=0.1).leaner() == AdamW8bit(lr=3e-4, weight_decay=0.1)
    assert AdamW8bit().leaner() is None


def test_options_that_were_dropped_are_read_where_they_had_no_effect() -> None:
    saved = json.loads(TrainConfig().to_json())
    saved["objective"] |= {"magnitude_weight": 1.0, "band_low": 0.0, "band_high": 1.0}
    assert TrainConfig.from_json(json.dumps(saved)) == TrainConfig()
    saved["objective"]["band_low"] = 0.6
    with pytest.raises(ConfigError, match="band_low"):
        TrainConfig.from_json(json.dumps(saved))
