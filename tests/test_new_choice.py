"""A new objective and a new optimizer are one class and one registry entry each: after that they are everywhere.

tests/comfyui/test_option_inputs.py finds the same two in a node.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch.nn import functional as F

from dopsd_core import arguments
from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.demo.settings import demo_config
from dopsd_core.objectives import OBJECTIVES, Objective, ObjectiveInputs, ObjectiveOutput
from dopsd_core.optimizers import OPTIMIZERS, AdamW, Optimizer
from dopsd_core.trainable import Trainable
from dopsd_core.training.checkpoint import StateError, load_checkpoint
from dopsd_core.training.log import read_log
from dopsd_core.training.trainer import NoCallbacks, train
from tests.stopping import StopAt
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes


class OneLevel(Objective):
    """Regresses the target from a single noise level."""

    name: ClassVar[str] = "one_level"
    summary: ClassVar[str] = "the target from one noise level"
    prefix: ClassVar[str] = "one_"

    level: float = Field(default=0.5, gt=0, le=1, description="the noise level that is trained")

    def backward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        targets = torch.stack([pair.target_latent for pair in inputs.pairs if pair.target_latent is not None])
        x = torch.lerp(targets, inputs.noise, self.level)
        with inputs.adapters.use("student"):
            x0 = inputs.denoiser.predict_x0(x, self.level, [pair.student for pair in inputs.pairs])
            loss = F.mse_loss(x0, targets)
            (loss * inputs.loss_scale).backward()
        return ObjectiveOutput(loss.item(), {"largest_error": (x0 - targets).abs().max().item()})


class Signs(torch.optim.Optimizer):
    """p <- p - lr * m with m <- momentum * m + sign(gradient)."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                direction = self.state[parameter].setdefault("direction", torch.zeros_like(parameter))
                direction.mul_(group["momentum"]).add_(parameter.grad.sign())
                parameter.sub_(direction, alpha=group["lr"])


class SignDescent(Optimizer):
    """Steps of one size."""

    name: ClassVar[str] = "signs"
    summary: ClassVar[str] = "steps of one size"
    bytes_per_parameter: ClassVar[int] = 4

    momentum: float = Field(default=0.9, ge=0, lt=1, description="share of the last direction that is kept")

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return Signs(parameters, self.lr, self.momentum)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    torch.set_num_threads(1)
    with OBJECTIVES.registered(OneLevel), OPTIMIZERS.registered(SignDescent):
        yield


def test_they_are_in_the_help_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parse_args(["train", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--objective {dopsd,sft,dreambooth,pso,one_level}" in words
    assert "one_level: the target from one noise level" in words
    assert "with --objective one_level: --one-level X" in words
    assert "the noise level that is trained (above 0 and at most 1; default 0.5)" in words
    assert "with --optimizer signs: --momentum X share of the last direction" in words
    assert (
        "(at least 0 and below 1; default 0.9)" in words
        and "with --optimizer adamw or adamw8bit or adafactor or muon or signs: --lr" in words
    )


def config_of(*words: str) -> TrainConfig:
    args = arguments.parse_args(["train", "images", "--output", "run", *words])
    return arguments.config_from_args(args, demo_config())


def test_their_options_are_set_and_checked() -> None:
    config = config_of("--objective", "one_level", "--one-level", ".25", "--optimizer", "signs", "--momentum", "0.5")
    assert config.objective == OneLevel(level=0.25)
    assert config.optimizer == SignDescent(lr=demo_config().optimizer.lr, momentum=0.5)
    with pytest.raises(ConfigError) as caught:
        config_of("--one-level", "2", "--optimizer", "signs", "--momentum", "1")
    assert caught.value.problems == (
        "momentum is 1.0; set it to at least 0 and below 1",
        "one_level is an option of objective one_level, and objective is dopsd; "
        "leave it out, or set objective to one_level",
    )


def test_a_run_with_them_is_saved_and_resumed_in_the_same_bits(tmp_path: Path) -> None:
    chosen = {"objective": "one_level", "one_level": 0.25, "optimizer": "signs", "momentum": 0.5}
    config = make_config(**chosen, batch_size=2)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    train(config, TinyDenoiser(), make_data(), tmp_path / "cut", StopAt(5))
    written = json.loads((tmp_path / "cut" / "config.json").read_text(encoding="utf-8"))
    assert written["objective"] == {"name": "one_level", "level": 0.25}
    assert written["optimizer"] == {"name": "signs", "lr": 0.01, "momentum": 0.5}
    same = TrainConfig.from_json((tmp_path / "cut" / "config.json").read_text(encoding="utf-8"))
    result = train(same, TinyDenoiser(), make_data(), tmp_path / "cut")
    assert result.step == 12 and saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")
    _, *reports = read_log(tmp_path / "cut" / "train.jsonl")
    assert all(report.metrics.keys() == {"largest_error"} and report.loss for report in reports)
    with pytest.raises(StateError, match="one_level: 0.25 -> 0.5"):
        train(make_config(**chosen | {"one_level": 0.5}, batch_size=2), TinyDenoiser(), make_data(), tmp_path / "cut")


# -- optimizers that train on other weights than they are judged by ----------------------------------------------------


class Switching(torch.optim.AdamW):
    """As schedule-free ones do it: `eval` puts other weights in place, here zeros, and `train` the trained ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained: list[torch.Tensor] | None = []

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def train(self) -> None:
        for parameter, value in zip(self._parameters(), self.trained or [], strict=False):
            parameter.data.copy_(value)
        self.trained = None

    def eval(self) -> None:
        assert self.trained is None, "already evaluating"
        self.trained = [parameter.detach().clone() for parameter in self._parameters()]
        for parameter in self._parameters():
            parameter.data.zero_()

    def step(self, closure: Any = None) -> None:
        assert self.trained is None, "a step with the weights to sample with"
        super().step(closure)


class ScheduleFree(AdamW):
    """A stand-in."""

    name: ClassVar[str] = "schedule_free"

    def build(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return Switching(parameters, lr=self.lr, weight_decay=self.weight_decay)


def test_probe_previews_and_the_lora_file_get_the_weights_to_sample_with(tmp_path: Path) -> None:
    trained_in_preview: list[bool] = []

    class Host(NoCallbacks):
        def on_preview(self, step: int, adapters: Trainable) -> None:
            trained_in_preview.append(any(bool(value.any()) for value in adapters.state().values()))

    with OPTIMIZERS.registered(ScheduleFree):
        config = make_config(optimizer="schedule_free", preview_every=4, teacher="frozen")
        result = train(config, TinyDenoiser(), make_data(), tmp_path / "switching", Host())
    train(make_config(preview_every=4, teacher="frozen"), TinyDenoiser(), make_data(), tmp_path / "plain")
    assert trained_in_preview == [False] * 4
    measured = [report.relative_gap for report in read_log(tmp_path / "switching" / "train.jsonl")]
    assert [gap for gap in measured if gap is not None] == [1.0] * 4  # without a LoRA the gap stays
    checkpoints = [load_checkpoint(tmp_path / run / "checkpoints") for run in ("switching", "plain")]
    switching, plain = [checkpoint.lora for checkpoint in checkpoints if checkpoint is not None]
    torch.testing.assert_close(dict(switching), dict(plain), rtol=0, atol=0)
    assert not any(value.any() for value in load_lora(result.lora_path)[0].values())
