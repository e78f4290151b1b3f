"""Optimizers: the right step, the whole state in checkpoints, exact resuming, and one sentence for what is missing."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.optimizers import OPTIMIZERS, Adafactor, AdamW, AdamW8bit, Custom, Muon, Optimizer, Prodigy, evaluating
from dopsd_core.optimizers.state import resumes_exactly
from dopsd_core.options import changed
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.trainer import check_run, train
from tests.stopping import StopAt
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes

CPU = torch.device("cpu")
CHOICES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "adafactor": {"weight_decay": 0.1},
    "muon": {"weight_decay": 0.1},
    "prodigy": {"prodigy_weight_decay": 0.1},
    "custom": {"custom_path": "torch.optim:NAdam", "custom_options": '{"betas": [0.8, 0.9]}', "custom_lr": 1e-2},
}
"""Name -> options by flat name, for every optimizer that runs on a CPU."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def skip_if_missing(name: str) -> None:
    if name in ("prodigy", "adafactor"):
        pytest.importorskip({"prodigy": "prodigyopt", "adafactor": "transformers"}[name])


def problem_of(make: Callable[[], object]) -> str:
    """The only problem that the ConfigError reports."""
    with pytest.raises(ConfigError) as caught:
        make()
    (problem,) = caught.value.problems
    return problem


def test_every_optimizer_but_the_one_for_nvidia_is_tried_here() -> None:
    assert OPTIMIZERS.keys() - CHOICES.keys() == {AdamW8bit.name}


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    skip_if_missing(name)
    config = make_config(optimizer=name, **CHOICES[name], schedule="cosine", warmup=3)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    for step in (2, 7):
        train(config, TinyDenoiser(), make_data(), tmp_path / "cut", StopAt(step))
    written = (tmp_path / "cut" / "config.json").read_text(encoding="utf-8")
    assert TrainConfig.from_json(written) == config
    train(config, TinyDenoiser(), make_data(), tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_changes_every_parameter_and_its_state_fits_the_planned_space(name: str, tmp_path: Path) -> None:
    skip_if_missing(name)
    config = make_config(optimizer=name, **CHOICES[name])
    train(config, TinyDenoiser(), make_data(), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and all(value.any() for value in checkpoint.lora.values())
    start = config.adapter.build(TinyDenoiser(), config.teacher, config.seed).state()
    assert not any(torch.equal(checkpoint.lora[key], start[key]) for key in start)
    parameters = sum(value.numel() for value in start.values())
    scalars = 8 * 8 * len(start)  # step counters and the like, which the header of a tensor covers
    size = sum(value.numel() * value.element_size() for value in checkpoint.optimizer.values())
    assert size <= config.optimizer.saved_bytes(parameters, len(start)) + scalars


# -- the right step ----------------------------------------------------------------------------------------------------


def stepped(optimizer: Optimizer, start: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parameter [rows, columns] after a step with each gradient."""
    parameter = nn.Parameter(start.clone())
    made = optimizer.build([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


def test_adafactor_steps_by_the_learning_rate_whatever_the_size_of_parameter_and_gradient() -> None:
    """For a gradient u v^T the factored second moment is exact, so that the first step is lr * sign."""
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 1, generator=generator) @ torch.randn(1, 7, generator=generator)
    for size in (1e-4, 1.0, 1e3):
        moved = stepped(Adafactor(lr=1e-2), torch.zeros(5, 7), [size * gradient])
        torch.testing.assert_close(moved, -1e-2 * gradient.sign(), rtol=1e-3, atol=1e-7)


def test_muon_steps_along_all_directions_alike_with_the_size_of_adamws_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(64, 16, generator=generator))
    gradient = left @ torch.diag(torch.logspace(0, -1, 16)) @ right.T
    moved = stepped(Muon(lr=1e-2), torch.zeros(16, 64), [gradient])
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 3  # those of the gradient differ tenfold
    torch.testing.assert_close(moved.square().mean().sqrt().item(), 0.2 * 1e-2, rtol=0.3, atol=0.0)


def test_prodigy_finds_the_learning_rate() -> None:
    """On a quadratic, at prodigy_lr 1: from an estimate of 1e-6 to the minimum, for targets of two magnitudes."""
    pytest.importorskip("prodigyopt")
    for size in (0.01, 10.0):
        target = size * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        parameter = nn.Parameter(torch.zeros(4, 6))
        made = Prodigy().build([parameter])
        for _ in range(300):
            parameter.grad = parameter.detach() - target
            made.step()
        assert (parameter.detach() - target).norm() < 0.05 * target.norm()


def test_another_optimizer_does_not_take_over_a_learning_rate_of_another_kind() -> None:
    config = TrainConfig(optimizer=AdamW(lr=3e-4, weight_decay=0.1))
    assert changed(config, {"optimizer": "adafactor"}).optimizer == Adafactor(lr=3e-4, weight_decay=0.1)
    assert changed(config, {"optimizer": "muon"}).optimizer == Muon(lr=3e-4, weight_decay=0.1)
    assert changed(config, {"optimizer": "prodigy"}).optimizer == Prodigy(lr=1.0)
    assert problem_of(lambda: changed(config, {"optimizer": "prodigy", "lr": 1e-4})).startswith(
        "lr is an option of optimizer adamw or adamw8bit or adafactor or muon, and optimizer is prodigy, whose own is "
        "prodigy_lr; set that, or set optimizer to adamw or"
    )


def test_a_small_factor_of_prodigys_estimate_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prodigyopt")
    Prodigy(lr=0.5).build([nn.Parameter(torch.zeros(2, 2))])
    assert not caplog.records
    Prodigy(lr=1e-4).build([nn.Parameter(torch.zeros(2, 2))])
    assert caplog.messages == ["prodigy_lr is 0.0001; Prodigy estimates the learning rate and needs 1 here"]


# -- what is missing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("adafactor", "transformers.optimization", "transformers"),
        ("adamw8bit", "bitsandbytes.optim", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_one_sentence_before_anything_is_written(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = make_config(optimizer=name)
    for start in (check_run, train):
        problem = problem_of(lambda start=start: start(config, TinyDenoiser(), make_data(), tmp_path / "run"))
        assert problem.startswith(f"optimizer {name} needs {package} (") and problem.endswith("set optimizer to adamw")
    assert not list(tmp_path.iterdir())


def test_a_torch_without_muon_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    problem = problem_of(lambda: check_run(make_config(optimizer="muon"), TinyDenoiser(), make_data(), tmp_path))
    assert problem == (
        f"optimizer muon needs torch 2.9, this is {torch.__version__}; update torch, or set optimizer to adamw"
    )


# -- any optimizer by path ---------------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """SGD with something in its state that only memory can hold."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = {1, 2}
        return super().step(closure)


class Packed(torch.Tensor):
    """Another kind of tensor, as torchao's moments of 8 bits."""


class Packing(torch.optim.SGD):
    """SGD with a state of that kind, for large weights alone."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.numel() >= 4096:
                self.state[parameter]["moment"] = torch.zeros(3).as_subclass(Packed)
        return super().step(closure)


class Forgetful(torch.optim.SGD):
    """Its steps grow with a counter that is in no state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad *= self.count
        return super().step(closure)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `asked_for` with the classes above."""
    module: Any = types.ModuleType("asked_for")
    module.Counting, module.Forgetful, module.number, module.Linear = Counting, Forgetful, 3, nn.Linear
    module.TensorRate, module.Packing = TensorRate, Packing
    monkeypatch.setitem(sys.modules, "asked_for", module)


def test_a_class_by_path_takes_its_options() -> None:
    made = Custom(path="torch.optim:NAdam", lr=0.5, options='{"betas": [0.8, 0.9], "eps": 1e-6}').build(
        [nn.Parameter(torch.zeros(2, 2))]
    )
    (group,) = made.param_groups
    assert isinstance(made, torch.optim.NAdam)
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "custom_path is ''; write the optimizer's class as package.module:Class"),
        ({"path": "torch.optim.NAdam"}, "custom_path is 'torch.optim.NAdam'; write"),
        ({"path": "/tmp/x.py:NAdam"}, "custom_path is '/tmp/x.py:NAdam'; write"),
        ({"path": "torch.optim:SGD", "options": "momentum=0.9"}, "custom_options is not JSON ("),
        ({"path": "torch.optim:SGD", "options": "[1]"}, "custom_options is [1]; write it as a JSON object"),
        ({"path": "torch.optim:SGD", "options": '{"lr": 1}'}, "custom_options contains lr; remove it, and set"),
    ],
)
def test_what_cannot_be_a_path_or_options_is_refused_at_once(options: dict[str, Any], problem: str) -> None:
    assert problem_of(lambda: Custom(**options)).startswith(problem)
    assert problem_of(lambda: TrainConfig.from_json(json.dumps({"optimizer": {"name": "custom", **options}}))) == (
        problem_of(lambda: Custom(**options))
    )


@pytest.mark.parametrize(
    ("path", "options", "problem"),
    [
        ("no_such_package.at_all:X", "{}", "custom_path no_such_package.at_all:X cannot be imported (No module named"),
        ("asked_for:Absent", "{}", "custom_path asked_for:Absent cannot be imported (module 'asked_for' has no"),
        ("asked_for:number", "{}", "custom_path asked_for:number is not a class of torch.optim.Optimizer"),
        ("asked_for:Linear", "{}", "custom_path asked_for:Linear is not a class of torch.optim.Optimizer"),
        ("torch.optim:SGD", '{"betas": 1}', 'torch.optim:SGD does not take lr and custom_options {"betas": 1}: '),
        ("torch.optim:SGD", '{"momentum": -1}', 'torch.optim:SGD does not take lr and custom_options {"momentum": -1}'),
        ("torch.optim:LBFGS", "{}", "torch.optim:LBFGS with custom_options {} fails in a trial step (TypeError: "),
        (
            "torch.optim:SparseAdam",
            "{}",
            "torch.optim:SparseAdam with custom_options {} fails in a trial step (Runtime",
        ),
        (
            "torch.optim:NAdam",
            '{"betas": [0.9]}',
            'torch.optim:NAdam with custom_options {"betas": [0.9]} ',
        ),
        ("asked_for:Counting", "{}", "asked_for:Counting cannot be used: the optimizer's state contains a set at"),
        ("asked_for:Packing", "{}", "asked_for:Packing cannot be used: the optimizer's state contains a Packed at"),
    ],
)
def test_a_class_that_does_not_work_is_one_sentence_before_training(
    path: str, options: str, problem: str, tmp_path: Path, installed: None
) -> None:
    config = make_config(optimizer="custom", custom_path=path, custom_options=options)
    assert problem_of(lambda: check_run(config, TinyDenoiser(), make_data(), tmp_path / "run")).startswith(problem)
    assert not list(tmp_path.iterdir())


def test_a_class_that_does_not_resume_exactly_is_warned_about(
    installed: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    train(make_config(optimizer="custom", custom_path="torch.optim:SGD"), TinyDenoiser(), make_data(), tmp_path / "a")
    assert not caplog.records
    config = make_config(optimizer="custom", custom_path="asked_for:Forgetful")
    train(config, TinyDenoiser(), make_data(), tmp_path / "b")
    assert [message for message in caplog.messages if "asked_for" in message] == [
        "asked_for:Forgetful does not continue from its saved state exactly: a resumed run will differ from an "
        "uninterrupted one"
    ]


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_passes_the_trial_of_a_class_by_path(name: str) -> None:
    skip_if_missing(name)
    optimizer = changed(TrainConfig(), {"optimizer": name, **CHOICES[name]}).optimizer
    assert resumes_exactly(optimizer.build, CPU)
    assert not resumes_exactly(lambda parameters: Forgetful(parameters, lr=0.1), CPU)


class Seldom(torch.optim.SGD):
    """Adds what its state does not contain in every tenth step."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for parameter in self.param_groups[0]["params"] if self.count % 10 == 0 else ():
            parameter.grad += 1.0
        return super().step(closure)


class Averaging(torch.optim.SGD):
    """Schedule-free: weights for evaluation that lead back to those for training up to rounding."""

    def _lerp(self, back: bool) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                average = self.state[parameter].setdefault("average", torch.full_like(parameter, 1 / 3))
                if back:
                    parameter.sub_(average, alpha=0.7).div_(0.3)
                else:
                    parameter.mul_(0.3).add_(average, alpha=0.7)

    def eval(self) -> None:
        self._lerp(back=False)

    def train(self) -> None:
        if any("average" in self.state[parameter] for parameter in self.param_groups[0]["params"]):
            self._lerp(back=True)


class TensorRate(torch.optim.SGD):
    """As torchao's: its learning rate is a tensor, which must not be replaced."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["lr"] = torch.tensor(lr)

    def step(self, closure: Any = None) -> Any:
        if not all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups):
            raise RuntimeError("lr was changed to a non-Tensor object")
        return super().step(closure)


def test_a_learning_rate_that_is_a_tensor_follows_the_schedule(installed: None, tmp_path: Path) -> None:
    made = []
    for path in ("asked_for:TensorRate", "torch.optim:SGD"):
        config = make_config(optimizer="custom", custom_path=path, custom_lr=1e-2, schedule="cosine")
        made.append(train(config, TinyDenoiser(), make_data(), tmp_path / path.replace(":", "_")))
    one, other = (load_file(run.lora_path) for run in made)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_trial_sees_what_an_optimizer_does_only_now_and_then() -> None:
    assert not resumes_exactly(lambda parameters: Seldom(parameters, lr=0.1), CPU)


def test_evaluating_leaves_no_rounding_in_the_weights_for_training() -> None:
    parameter = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    optimizer, before = Averaging([parameter], lr=0.1), parameter.detach().clone()
    with evaluating(optimizer):
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)
