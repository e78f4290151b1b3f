"""The deterministic option: torch's algorithms inside training steps alone, given back whatever happens."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dopsd_core import arguments
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import ConfigError, TrainConfig, changes_that_forbid_resuming
from dopsd_core.trainable import Trainable
from dopsd_core.training.determinism import deterministic_algorithms, obstacle
from dopsd_core.training.log import StepReport
from dopsd_core.training.trainer import NoCallbacks, train
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes

enabled = torch.are_deterministic_algorithms_enabled
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_it_was() -> object:
    yield
    torch.use_deterministic_algorithms(False)


class Watching(TinyDenoiser):
    """Remembers how forwards and backwards find torch's settings; fails at `fail_at`."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.seen: set[bool] = set()
        self.fail_at = fail_at

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        if self.calls == self.fail_at:
            raise RuntimeError("lost")
        self.seen.add(enabled())
        x0 = super().predict_x0(x, sigma, conditions)
        if x0.requires_grad:
            x0.register_hook(lambda grad: self.seen.add(enabled()))
        return x0


class Host(NoCallbacks):
    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def on_step(self, report: StepReport) -> None:
        self.seen.add(enabled())

    def on_preview(self, step: int, adapters: Trainable) -> None:
        self.seen.add(enabled())


@pytest.mark.parametrize("is_on", [True, False])
def test_steps_have_it_and_the_host_does_not(tmp_path: Path, is_on: bool) -> None:
    denoiser, host = Watching(), Host()
    config = make_config(steps=2, deterministic=is_on, probe_every=0, preview_every=1)
    train(config, denoiser, make_data(), tmp_path, host)
    assert denoiser.seen == {is_on} and host.seen == {False} and not enabled()


def test_on_a_cpu_it_changes_nothing(tmp_path: Path) -> None:
    for name, is_on in (("on", True), ("off", False)):
        train(make_config(deterministic=is_on), TinyDenoiser(), make_data(), tmp_path / name)
    on, off = saved_bytes(tmp_path / "on"), saved_bytes(tmp_path / "off")
    assert on.pop("header") != off.pop("header") and on == off


@pytest.mark.parametrize("before", ["off", "warn", "error"])
@pytest.mark.parametrize("benchmark", [True, False])
def test_the_callers_settings_come_back_after_an_error(tmp_path: Path, before: str, benchmark: bool) -> None:
    torch.set_deterministic_debug_mode({"off": "default", "warn": "warn", "error": "error"}[before])
    mode, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        with pytest.raises(RuntimeError, match="lost"):
            train(make_config(deterministic=True), Watching(fail_at=30), make_data(), tmp_path)
        with deterministic_algorithms(True):
            assert torch.get_deterministic_debug_mode() == 2 and not torch.backends.cudnn.benchmark
        assert torch.get_deterministic_debug_mode() == mode and torch.backends.cudnn.benchmark == benchmark
    finally:
        torch.backends.cudnn.benchmark = cudnn


def test_an_operation_without_a_deterministic_form_is_named(tmp_path: Path) -> None:
    class Puts(TinyDenoiser):
        def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
            return super().predict_x0(x, sigma, conditions)

    with pytest.raises(ConfigError, match="deterministic is on, but put_.* of this model has no .*; turn it off"):
        train(make_config(deterministic=True, probe_every=0), Puts(), make_data(), tmp_path)
    assert train(make_config(steps=1), Puts(), make_data(), tmp_path / "off").step == 1 and not enabled()


def test_what_cuda_needs_is_said_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert obstacle(torch.device("cpu")) is None
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in (obstacle(CUDA) or "")

    class OnCuda(TinyDenoiser):
        device = property(lambda self: CUDA)  # type: ignore[assignment]

    denoiser = OnCuda()
    with pytest.raises(ConfigError, match="deterministic needs .* or turn deterministic off"):
        train(make_config(deterministic=True), denoiser, make_data(), tmp_path / "run")
    assert denoiser.calls == 0 and not (tmp_path / "run").exists()
    for value in (":4096:8", ":16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        assert obstacle(CUDA) is None
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert obstacle(CUDA) is not None


def test_it_is_part_of_a_runs_identity_only_when_on() -> None:
    """So that a run of a release without the option is still found."""
    off = make_config()
    on = off.replace(deterministic=True)
    assert "deterministic" not in off.identity() and on.identity() == off.identity() | {"deterministic": True}
    assert "steps" not in off.identity() and off.identity()["seed"] == 0
    older = {name: value for name, value in json.loads(off.to_json()).items() if name != "deterministic"}
    assert TrainConfig.from_json(json.dumps(older)) == off
    assert changes_that_forbid_resuming(off, on) == ("deterministic: False -> True",)


@pytest.mark.parametrize("value", [1, "yes", None, 0.0])
def test_it_is_true_or_false(value: object) -> None:
    with pytest.raises(ConfigError, match="deterministic is .*, it must be true or false"):
        make_config(deterministic=value)


def test_the_command_line_switches_it() -> None:
    def parsed(*words: str) -> TrainConfig:
        args = arguments.make_parser().parse_args(["train", "photos", "--output", "run", *words])
        return arguments.config_from_args(args, make_config(deterministic="--no" in " ".join(words)))

    assert parsed("--deterministic").deterministic
    assert not parsed("--no-deterministic").deterministic and not parsed().deterministic
