"""A configuration is checked as a whole, with remedies, and survives JSON."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopsd_core.adapters.lora_config import LoraConfig
from dopsd_core.config import ConfigError, TrainConfig, changes_that_forbid_resuming
from dopsd_core.objectives import DOPSD, SFT
from dopsd_core.optimizers.optimizer import learning_rate

LORA = LoraConfig(rank=4, alpha=8.0, targets=("to_q", "to_k"))


def problems_of(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(lora=LORA, **fields)
    return str(caught.value)


@given(
    steps=st.integers(1, 10_000),
    lr=st.floats(1e-8, 0.1),
    decay=st.floats(0, 1),
    m=st.one_of(st.none(), st.integers(1, 4)),
    teacher=st.sampled_from(["ema", "frozen", "same"]),
    seed=st.integers(0, 2**63),
)
def test_json_round_trip(steps: int, lr: float, decay: float, m: int | None, teacher: Any, seed: int) -> None:
    config = TrainConfig(lora=LORA, steps=steps, lr=lr, ema_decay=decay, grad_steps=m, teacher=teacher, seed=seed)
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"steps": 0}, "steps is 0; set it to at least 1"),
        ({"steps": 1.5}, "steps is 1.5, it must be a whole number"),
        ({"steps": True}, "steps is True, it must be a whole number"),
        ({"lr": 0}, "lr is 0; set it above 0"),
        ({"lr": 3.0}, "lr is 3.0: that destroys"),
        ({"lr": math.nan}, "lr is nan, it must be a finite number"),
        ({"lr": "1e-4"}, "lr is '1e-4', it must be a number"),
        ({"schedule": "linear"}, "schedule is 'linear'; choose one of constant, cosine"),
        ({"teacher": "none"}, "teacher is 'none'; choose one of ema, frozen, same"),
        ({"objective": "pso"}, "objective is 'pso'; choose one of dopsd, sft"),
        ({"family": "sdxl"}, "family is 'sdxl'; choose one of z_image, flux2_klein"),
        ({"optimizer": None}, "optimizer is None, it must be text"),
        ({"loss": "v"}, "loss is 'v'; choose one of x0, velocity"),
        ({"ema_decay": 1.1}, "ema_decay is 1.1; set it within 0 and 1"),
        ({"caption_dropout": -0.1}, "caption_dropout is -0.1"),
        ({"grad_steps": 5}, "grad_steps is 5; set it within 1 and rollout_steps (4)"),
        ({"grad_steps": 0}, "or null for all"),
        ({"steps": 10, "warmup": 10}, "warmup (10) leaves none of the 10 steps"),
        ({"seed": -1}, "seed is -1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0; set it to at least 1"),
    ],
)
def test_every_mistake_is_named_with_a_remedy(fields: dict[str, Any], words: str) -> None:
    assert words in problems_of(**fields)


def test_all_mistakes_at_once() -> None:
    message = problems_of(steps=0, lr=-1.0, schedule="x", ema_decay=2.0)
    assert message.startswith("4 problems")
    assert all(f"\n- {name} is" in message for name in ("steps", "lr", "schedule", "ema_decay"))


def test_mistakes_in_json() -> None:
    fields = json.loads(TrainConfig(lora=LORA).to_json())
    bad = fields | {"stpes": 3, "batch_size": 0, "lora": fields["lora"] | {"rank": 0, "alhpa": 1}}
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(json.dumps(bad))
    message = str(caught.value)
    for words in ("did you mean steps?", "did you mean lora.alpha?", "rank must be within", "batch_size is 0"):
        assert words in message
    deep = "[" * 100_000
    for text, words in (("[]", "JSON object"), ("{", "not JSON"), (deep, "not JSON"), ("{}", "lora is missing")):
        with pytest.raises(ConfigError, match=words):
            TrainConfig.from_json(text)
    assert TrainConfig.from_json(json.dumps({"lora": fields["lora"]})) == TrainConfig(lora=LORA)


def test_every_field_is_explained() -> None:
    text = TrainConfig.__doc__ or ""
    assert [field.name for field in dataclasses.fields(TrainConfig) if field.name not in text] == []


@given(step=st.integers(0, 99), warmup=st.integers(0, 50), schedule=st.sampled_from(["constant", "cosine"]))
def test_the_rate_rises_then_never_rises_again(step: int, warmup: int, schedule: Any) -> None:
    config = TrainConfig(lora=LORA, steps=100, lr=1e-3, warmup=warmup, schedule=schedule)
    rate, following = learning_rate(config, step), learning_rate(config, step + 1)
    assert 0 < rate <= 1e-3
    assert (following > rate) if step < warmup else (following <= rate)


def test_the_rate_by_hand() -> None:
    warm = TrainConfig(lora=LORA, steps=10, lr=1.0e-2, warmup=3)
    assert [learning_rate(warm, step) for step in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    cosine = TrainConfig(lora=LORA, steps=4, lr=1.0e-2, schedule="cosine")
    half = math.sqrt(0.5)
    expected = [0.01, 0.005 * (1 + half), 0.005, 0.005 * (1 - half), 0.0]
    assert [learning_rate(cosine, step) for step in range(5)] == pytest.approx(expected, abs=1e-12)


def test_what_may_change_on_resuming() -> None:
    config = TrainConfig(lora=LORA)
    free = dataclasses.replace(config, steps=900, checkpoint_every=7, keep_checkpoints=5, probe_every=0)
    assert changes_that_forbid_resuming(config, free) == ()
    other = dataclasses.replace(config, clip=2.0, lora=dataclasses.replace(LORA, rank=8))
    changes = changes_that_forbid_resuming(config, other)
    assert len(changes) == 2 and "clip: 1.0 -> 2.0" in changes and "'rank': 8" in changes[0]


def test_objectives_get_their_options() -> None:
    config = TrainConfig(lora=LORA, grad_steps=2, loss="velocity", anchor_probability=0.25)
    assert config.make_objective() == DOPSD(grad_steps=2, loss="velocity", anchor_probability=0.25)
    sft = dataclasses.replace(config, objective="sft", sft_sigmas="grid")
    assert sft.make_objective() == SFT(sigmas="grid", shift=3.0)
    assert sft.idle_fields() == ("grad_steps", "loss", "anchor_probability") and config.idle_fields() == ()
