"""fp16 training: gradients as in fp32, overflow repeated and never skipped, the scale resumes."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dopsd_core.conditioning.encode import Condition
from dopsd_core.training import loss_scale
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.log import StepReport, read_log
from dopsd_core.training.loss_scale import LossScale
from dopsd_core.training.nonfinite import NonFiniteError
from dopsd_core.training.run import Run
from dopsd_core.training.trainer import NoCallbacks, train
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes

FAINT = 3e-4
"""How much of the network's velocity counts: gradients are as small as those of a mean over a large latent."""


class FaintDenoiser(TinyDenoiser):
    """The tiny network with weights that fp16 holds exactly, its velocity scaled down; computes in fp16 if `half`."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half()
        if not half:
            self.float()
        self.spoil = ""  # "teacher" or "gradient": what is not finite

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        dtype = self.compute_dtype
        read = torch.stack([condition.features.mean(dim=0) for condition in conditions])
        tokens = x.flatten(2).transpose(1, 2).to(dtype)
        hidden = torch.tanh(self.enter(tokens) + self.read(read.to(dtype))[:, None] + sigma)
        velocity = self.leave(hidden).transpose(1, 2).reshape(x.shape).float()
        if self.spoil == "teacher" and not torch.is_grad_enabled():
            velocity = velocity * torch.nan
        if self.spoil == "gradient" and velocity.requires_grad:
            velocity.register_hook(lambda grad: grad * torch.inf)
        return x - sigma * FAINT * velocity


def half_config(**settings: Any) -> Any:
    return make_config(**({"lr": 1e-2, "max_grad_norm": 1.0, "probe_every": 0} | settings))


def gradient(half: bool, folder: Path) -> Tensor:
    """Of the first optimizer step, accumulated over two micro batches of four rollout steps each, before clipping."""
    run = Run(half_config(grad_accumulation=2, max_grad_norm=0.0), FaintDenoiser(half), make_data(2), folder)
    state = run.adapters.state()
    generator = torch.Generator().manual_seed(1)
    run.adapters.load_state("student", {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in state.items()})
    with run.adapters.attached():
        run.gradients.accumulate(run.step, run.optimizer)
    return torch.cat([p.grad.flatten() for p in run.adapters.parameters() if p.grad is not None])


# -- the scale ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_the_scale_follows_torchs_grad_scaler(overflows: list[bool]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "INITIAL", 2.0**30)
        patch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
        patch.setattr(loss_scale, "LARGEST", math.inf)
        patch.setattr(loss_scale, "SMALLEST", 0.0)
        ours = LossScale(torch.float16)
        for overflow in overflows:
            scaled = theirs.scale(torch.ones(()))
            assert ours.value == scaled.item()
            parameter.grad = torch.full((2,), math.inf if overflow else 6.0) * scaled
            own = parameter.grad.clone()
            ours.unscale([own])
            theirs.step(optimizer)
            theirs.update()
            assert torch.equal(own, parameter.grad)
            if overflow:
                assert ours.after_overflow()
            else:
                ours.after_step()


def test_its_bounds_hold() -> None:
    scale = LossScale(torch.float16)
    assert sum(iter(scale.after_overflow, False)) == math.log2(loss_scale.INITIAL) and scale.value == 1.0
    scale.load((loss_scale.LARGEST, loss_scale.GROWTH_INTERVAL - 1))
    scale.after_step()
    assert scale.state() == (loss_scale.LARGEST, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_scaled_elsewhere(dtype: torch.dtype) -> None:
    scale, grad = LossScale(dtype), torch.full((3,), 1e-30)
    scale.unscale([grad])
    scale.after_step()
    assert scale.value == 1.0 and scale.state() is None and not scale.after_overflow()
    assert torch.equal(grad, torch.full((3,), 1e-30))


# -- a run in fp16 -----------------------------------------------------------------------------------------------------


def test_gradients_in_fp16_are_those_of_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradient(False, tmp_path)
    assert (gradient(True, tmp_path) - wanted).norm() < 0.02 * wanted.norm()
    monkeypatch.setattr(loss_scale, "INITIAL", 1.0)  # as it was without a scale
    unscaled = gradient(True, tmp_path)
    assert (unscaled - wanted).norm() > 0.3 * wanted.norm() and (unscaled == 0).float().mean() > 0.3


def test_a_step_that_overflows_is_repeated_and_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as one that began with the scale that was right: same data, same noise, one update of the teacher."""
    reports: list[StepReport] = []

    class Recorder(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            reports.append(report)

    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**60)
    config = half_config(steps=5, teacher="ema", grad_accumulation=2)
    train(config, FaintDenoiser(True), make_data(), tmp_path / "high", Recorder())
    first = reports[0]
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert first.overflows and first.loss_scale == 2.0**60 / 2**first.overflows
    assert reports == read_log(tmp_path / "high" / "train.jsonl")
    monkeypatch.setattr(loss_scale, "INITIAL", first.loss_scale)
    train(config, FaintDenoiser(True), make_data(), tmp_path / "right")
    assert saved_bytes(tmp_path / "high") == saved_bytes(tmp_path / "right")


def test_the_scale_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after each step and resumed, with a scale that grows and falls all the time."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**26)
    train(half_config(steps=9), FaintDenoiser(True), make_data(), tmp_path / "whole")
    for steps in range(1, 10):
        train(half_config(steps=steps), FaintDenoiser(True), make_data(), tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")
    scales = [report.loss_scale for report in read_log(tmp_path / "whole" / "train.jsonl")]
    assert len(set(scales)) > 2
    ends = [load_checkpoint(tmp_path / name / "checkpoints") for name in ("cut", "whole")]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].facts["loss_scale"] == ends[1].facts["loss_scale"] is not None


def test_a_checkpoint_without_a_scale_is_resumed_in_fp16(tmp_path: Path) -> None:
    train(half_config(steps=3), FaintDenoiser(False), make_data(), tmp_path)
    assert train(half_config(steps=5), FaintDenoiser(True), make_data(), tmp_path).step == 5
    scales = [report.loss_scale for report in read_log(tmp_path / "train.jsonl")]
    assert scales == [None, None, None, loss_scale.INITIAL, loss_scale.INITIAL]


def test_elsewhere_the_log_says_nothing_of_a_scale(tmp_path: Path) -> None:
    train(half_config(steps=3), FaintDenoiser(False), make_data(), tmp_path)
    assert "loss_scale" not in (tmp_path / "train.jsonl").read_text()


# -- what scaling cannot mend ------------------------------------------------------------------------------------------


def test_a_gradient_that_never_fits_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    denoiser = FaintDenoiser(True)

    class Spoil(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            denoiser.spoil = "gradient" if report.step == 4 else ""

    with pytest.raises(NonFiniteError, match="the gradient of step 5 is .*overflows in fp16; load the model in bf16"):
        train(half_config(), denoiser, make_data(), tmp_path, Spoil())
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 4 and checkpoint.facts["loss_scale"] == [1.0, 0]


def test_predictions_that_overflow_are_distinguished_from_gradients(tmp_path: Path) -> None:
    denoiser = FaintDenoiser(True)
    denoiser.spoil = "teacher"
    with pytest.raises(
        NonFiniteError, match=r"the loss of step 1 is nan \(not finite: the teacher's prediction at sigma 1\).*fp16"
    ) as caught:
        train(half_config(), denoiser, make_data(), tmp_path)
    assert "student" not in str(caught.value)


@pytest.mark.parametrize("half", [True, False])
def test_a_model_that_gives_nan_is_found_before_training(tmp_path: Path, half: bool) -> None:
    denoiser = FaintDenoiser(half)
    denoiser.spoil = "teacher"
    cause = "overflows in fp16" if half else "nothing is trained yet"
    with pytest.raises(NonFiniteError, match=f"the gap to the teacher of step 0 is nan.*{cause}.*bf16 or fp32"):
        train(half_config(probe_every=5), denoiser, make_data(), tmp_path)


def test_target_and_student_are_distinguished_in_sft(tmp_path: Path) -> None:
    data = make_data()
    data.pairs[0].target_latent[0] = torch.nan  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="not finite: the target latent|not finite: the student's"):
        train(half_config(objective="sft"), FaintDenoiser(True), data, tmp_path)


def test_that_losses_are_scaled_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dopsd"):
        train(half_config(steps=1), FaintDenoiser(True), make_data(), tmp_path)
    assert "computes in fp16: loss scale 65536" in caplog.text
