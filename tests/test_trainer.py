"""A run ends the same however it is cut; what stops it is named and costs nothing that was trained."""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.config import ConfigError
from dopsd_core.data.encoding_plan import Example
from dopsd_core.files.lock import FolderInUse
from dopsd_core.optimizers import AdamW
from dopsd_core.trainable import Trainable
from dopsd_core.training.checkpoint import Checkpoint, StateError, load_checkpoint
from dopsd_core.training.log import StepReport, curve, read_log
from dopsd_core.training.run import Run
from dopsd_core.training.trainer import NoCallbacks, NonFiniteError, TrainingSet, TrainResult, train
from dopsd_core.training.world import Turn
from tests.forked import forking
from tests.tiny import (
    TinyDenoiser,
    killable_config,
    killable_data,
    make_config,
    make_data,
    make_pair,
    run_to_the_end,
    run_until_call,
    saved_bytes,
)

STEPS = 18


class Recorder(NoCallbacks):
    """Remembers the reports; stops after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.reports: list[StepReport] = []
        self.previews: list[int] = []
        self.stop_after = stop_after

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_preview(self, step: int, adapters: Trainable) -> None:
        self.previews.append(step)

    def should_stop(self) -> bool:
        return bool(self.reports) and self.reports[-1].step == self.stop_after


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    train(killable_config(STEPS), TinyDenoiser(), killable_data(), folder)
    return saved_bytes(folder)


# -- cut and resumed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_it_ends_bit_identical(
    tmp_path: Path, uninterrupted: dict[str, bytes], seed: int
) -> None:
    chance = random.Random(seed)
    log = tmp_path / "train.jsonl"

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    moments = []
    for _ in range(4):
        child = forking().Process(target=run_to_the_end, args=(str(tmp_path), STEPS))
        child.start()
        reached = max(lines() - 3, 0) + chance.randint(2, 6)  # a checkpoint every 3 steps: the run gets on
        while child.is_alive() and lines() < reached:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break
        moments.append(lines())
    assert moments
    train(killable_config(STEPS), TinyDenoiser(), killable_data(), tmp_path)
    assert saved_bytes(tmp_path) == uninterrupted, f"killed after {moments} lines"
    assert [report.step for report in read_log(log)] == list(range(STEPS + 1))


@pytest.mark.skipif(sys.platform == "win32", reason="counts the calls of POSIX file functions")
@pytest.mark.parametrize(
    "name, number",
    [("fsync", 1), ("fsync", 6), ("fsync", 8), ("fsync", 9), ("fsync", 10), ("fsync", 16)]
    + [("replace", 3), ("replace", 4), ("replace", 6), ("rmdir", 1), ("unlink", 2)],
)
def test_killed_while_writing_it_ends_bit_identical(
    tmp_path: Path, uninterrupted: dict[str, bytes], name: str, number: int
) -> None:
    child = forking().Process(target=run_until_call, args=(str(tmp_path), STEPS, name, number))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    train(killable_config(STEPS), TinyDenoiser(), killable_data(), tmp_path)
    assert saved_bytes(tmp_path) == uninterrupted
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith("step-")] == []


class Adaptive(torch.optim.AdamW):
    """Keeps a step size that it learns in its groups, as Prodigy does, and one table in all states, as 8-bit Adam."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.table = torch.linspace(0.5, 1.5, 256)
        for group in self.param_groups:
            group["d"] = 1e-3

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"] *= 1.5
            group["lr"] = group["d"]
        result = super().step(closure)
        for state in self.state.values():
            state.setdefault("quant/state", {"table": self.table, "name": "dynamic"})
        return result


def test_all_of_an_optimizers_state_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW, "build", lambda self, parameters: Adaptive(parameters))
    train(make_config(), TinyDenoiser(), make_data(), tmp_path / "whole")
    for stop in (1, 4, 12):
        train(make_config(steps=stop), TinyDenoiser(), make_data(), tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


def test_a_run_of_release_0_2_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints hold the optimizer's state alone, by path, and nothing of a loss scale."""
    monkeypatch.setattr("dopsd_core.training.checkpoint.FORMAT", "dopsd-checkpoint-1")
    now = Run._checkpoint

    def then(self: Run) -> Checkpoint:
        checkpoint = now(self)
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{n}/{key}": value for n, values in state.items() for key, value in values.items()}
        facts = {k: v for k, v in checkpoint.facts.items() if k not in ("optimizer_state", "loss_scale")}
        config = {k: v for k, v in json.loads(facts["config"]).items() if k != "deterministic"}
        facts |= {"optimizer": {}, "config": json.dumps(config)}
        return Checkpoint(checkpoint.step, checkpoint.lora, checkpoint.teacher, tensors, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_checkpoint", then)
        train(make_config(steps=6), TinyDenoiser(), make_data(), tmp_path / "cut")
    monkeypatch.undo()
    state = json.loads((tmp_path / "cut/checkpoints/step-000006/state.json").read_text())
    assert state["format"] == "dopsd-checkpoint-1" and state["facts"]["optimizer"] == {}
    train(make_config(), TinyDenoiser(), make_data(), tmp_path / "cut")
    train(make_config(), TinyDenoiser(), make_data(), tmp_path / "whole")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


def test_an_unlike_seed_ends_unlike(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    config = killable_config(STEPS).replace(seed=1)
    train(config, TinyDenoiser(), killable_data(), tmp_path)
    assert saved_bytes(tmp_path) != uninterrupted


@pytest.mark.parametrize("teacher", ["ema", "frozen", "same"])
@pytest.mark.parametrize("objective", ["dopsd", "sft"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, teacher: str, objective: str) -> None:
    config = make_config(teacher=teacher, objective=objective, batch_size=2)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    for stop in (1, 5, 6):
        result = train(config, TinyDenoiser(), make_data(), tmp_path / "cut", Recorder(stop))
        assert result.stopped and result.step == stop and result.lora_path.exists()
    result = train(config, TinyDenoiser(), make_data(), tmp_path / "cut")
    assert not result.stopped and result.step == 12
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config()
    train(config, TinyDenoiser(), make_data(), tmp_path)
    whole = saved_bytes(tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "dopsd"):
        train(config, TinyDenoiser(), make_data(), tmp_path, recorder)
    assert "step-000012 is damaged" in caplog.text and "optimizer.safetensors" in caplog.text
    assert [report.step for report in recorder.reports] == [10, 11, 12]
    assert saved_bytes(tmp_path) == whole


def test_steps_may_be_added_and_nothing_else_changed(tmp_path: Path) -> None:
    train(make_config(steps=6), TinyDenoiser(), make_data(), tmp_path / "a")
    longer = make_config(steps=12, checkpoint_every=5)
    train(longer, TinyDenoiser(), make_data(), tmp_path / "a")
    train(longer, TinyDenoiser(), make_data(), tmp_path / "b")
    assert saved_bytes(tmp_path / "a") == saved_bytes(tmp_path / "b")
    with pytest.raises(StateError, match=r"seed: 0 -> 3; lr: 0.01 -> 0.1") as caught:
        train(make_config(lr=0.1, seed=3), TinyDenoiser(), make_data(), tmp_path / "a")
    assert "steps:" not in str(caught.value)
    with pytest.raises(StateError, match="the dataset"):
        train(longer, TinyDenoiser(), make_data(4), tmp_path / "a")
    with pytest.raises(StateError, match=r"already at step 12; raise steps \(6\)"):
        train(make_config(steps=6), TinyDenoiser(), make_data(), tmp_path / "a")
    with pytest.raises(StateError, match="already contains a run"):
        train(longer, TinyDenoiser(), make_data(), tmp_path / "a", resume=False)


def test_a_run_of_another_model_is_not_resumed(tmp_path: Path) -> None:
    def run(steps: int, model: str) -> None:
        facts = {"dopsd_base_fingerprint": model}
        train(make_config(steps=steps), TinyDenoiser(), make_data(), tmp_path, facts=facts)

    run(3, "one")
    run(6, "one")
    with pytest.raises(StateError, match="the model: its weights"):
        run(9, "another")


@pytest.mark.parametrize("teacher", ["ema", "frozen", "same"])
@pytest.mark.parametrize("has_initial", [False, True])
@pytest.mark.parametrize("steps", [6, 12])
def test_another_held_out_pair_is_no_other_run_and_has_its_own_start(
    tmp_path: Path, teacher: str, has_initial: bool, steps: int
) -> None:
    """As if the run were begun with it; steps: after 6 of 12 it is exchanged, or when nothing is left to do."""
    config, initial = make_config(teacher=teacher), None
    if has_initial:
        train(make_config(seed=5), TinyDenoiser(), make_data(), tmp_path / "first")
        initial = {key: value.float() for key, value in load_lora(tmp_path / "first" / "lora.safetensors")[0].items()}

    def run(folder: str, number: int | None, steps: int) -> TrainResult:
        data = make_data(heldout=make_pair(number) if number is not None else None)
        short = make_config(**(vars(config) | {"steps": steps}))
        return train(short, TinyDenoiser(), data, tmp_path / folder, initial=initial)

    wanted = run("whole", 50, 12)
    first = run("cut", 99, steps)
    assert first.start_gaps is not None and wanted.start_gaps is not None
    assert first.start_gaps.heldout != wanted.start_gaps.heldout
    result = run("cut", 50, 12)
    assert (result.start_gaps, result.end_gaps) == (wanted.start_gaps, wanted.end_gaps)
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")
    again = run("cut", 50, 12)
    assert (again.start_gaps, again.end_gaps) == (wanted.start_gaps, wanted.end_gaps)
    without = run("cut", None, 12)
    assert without.start_gaps is not None and without.start_gaps.heldout is None
    assert without.end_gaps is not None and without.end_gaps.heldout is None


# -- what a step is ----------------------------------------------------------------------------------------------------


def test_four_batches_of_one_are_one_batch_of_four() -> None:
    pairs = [make_pair(number) for number in range(4)]
    for pair in pairs:  # one length, so that the batch is computed alike
        object.__setattr__(pair.student, "features", pair.student.features[:3])
    gradients = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        config = make_config(batch_size=batch_size, grad_accumulation=accumulation, max_grad_norm=0)
        run = Run(config, TinyDenoiser(), TrainingSet(pairs), Path("unused"))
        with run.adapters.attached():
            for micro in range(accumulation):
                run.gradients.backward(0, Turn(micro))
        gradients.append([parameter.grad for parameter in run.adapters.parameters()])
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients[-1])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-8)


def test_the_gradient_is_clipped_and_its_norm_reported(tmp_path: Path) -> None:
    free, clipped = Recorder(), Recorder()
    train(make_config(steps=1, max_grad_norm=0), TinyDenoiser(), make_data(), tmp_path / "a", free)
    train(make_config(steps=1, max_grad_norm=1e-3), TinyDenoiser(), make_data(), tmp_path / "b", clipped)
    assert free.reports[1].grad_norm == clipped.reports[1].grad_norm
    run = Run(make_config(max_grad_norm=1e-3), TinyDenoiser(), make_data(), tmp_path)
    with run.adapters.attached():
        run.gradients.check_and_clip(0, [run.gradients.backward(0, Turn(0))])
    norm = torch.stack([parameter.grad.norm() for parameter in run.adapters.parameters()]).norm()  # type: ignore
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_training_reaches_the_teacher_and_says_so(tmp_path: Path) -> None:
    recorder = Recorder()
    config = make_config(steps=150, teacher="frozen", probe_every=50, preview_every=60)
    data = make_data(2, heldout=make_pair(9))
    result = train(config, TinyDenoiser(), data, tmp_path, recorder)
    assert result.start_gaps is not None and result.end_gaps is not None
    steps, relative = curve(recorder.reports, lambda report: report.relative_gap)
    assert steps == [0, 50, 100, 150] and relative[0] == 1 and relative[-1] < 0.7
    assert relative[-1] == pytest.approx(result.end_gaps.train / result.start_gaps.train)
    assert curve(recorder.reports, lambda report: report.heldout_relative_gap)[0] == steps
    assert recorder.previews == [0, 60, 120, 150]
    assert recorder.reports == read_log(tmp_path / "train.jsonl")
    assert all(report.seconds is not None and report.seconds >= 0 for report in recorder.reports[1:])


def test_the_saved_lora_is_the_student(tmp_path: Path) -> None:
    config = make_config()
    result = train(config, TinyDenoiser(), make_data(), tmp_path)
    saved, metadata = load_lora(result.lora_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and metadata["dopsd_step"] == "12"
    exported = config.adapter.exported(checkpoint.lora)
    torch.testing.assert_close(saved, exported, rtol=1e-2, atol=1e-3, check_dtype=False)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 12


def test_the_base_is_given_back_untouched(tmp_path: Path) -> None:
    denoiser = TinyDenoiser()
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    train(make_config(), denoiser, make_data(), tmp_path)
    assert "forward" not in denoiser.enter.__dict__
    torch.testing.assert_close(denoiser.state_dict(), before, rtol=0, atol=0)


def test_it_trains_inside_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        inside = train(make_config(), TinyDenoiser(), make_data(), tmp_path / "in")
    train(make_config(), TinyDenoiser(), make_data(), tmp_path / "out")
    assert inside.step == 12
    assert saved_bytes(tmp_path / "in") == saved_bytes(tmp_path / "out")


# -- what ends a run early ---------------------------------------------------------------------------------------------


def test_a_stop_before_the_first_step_saves_too(tmp_path: Path) -> None:
    result = train(make_config(), TinyDenoiser(), make_data(), tmp_path, Recorder(stop_after=0))
    assert result.stopped and result.step == 0 and result.lora_path.exists() and result.checkpoint_path.is_dir()
    train(make_config(), TinyDenoiser(), make_data(), tmp_path)
    train(make_config(), TinyDenoiser(), make_data(), tmp_path / "whole")
    assert saved_bytes(tmp_path) == saved_bytes(tmp_path / "whole")
    assert [report.step for report in read_log(tmp_path / "train.jsonl")] == list(range(13))


def test_a_loss_that_is_nan_stops_with_its_step(tmp_path: Path) -> None:
    denoiser = TinyDenoiser()
    calls_per_step = 2 * 4
    denoiser.poison_at = 5 * calls_per_step + 3
    config = make_config(probe_every=0)
    with pytest.raises(NonFiniteError, match="the loss of step 6 is nan") as caught:
        train(config, denoiser, make_data(), tmp_path)
    assert caught.value.step == 6
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 5
    assert all(tensor.isfinite().all() for tensor in [*checkpoint.lora.values(), *checkpoint.optimizer.values()])
    assert all(tensor.isfinite().all() for tensor in load_lora(tmp_path / "lora.safetensors")[0].values())
    denoiser.poison_at = None
    train(config, denoiser, make_data(), tmp_path)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    assert saved_bytes(tmp_path) == saved_bytes(tmp_path / "whole")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    runs: list[Run] = []
    really_open = Run.open

    def open_and_tell(self: Run, resume: bool) -> None:
        runs.append(self)
        really_open(self, resume)

    class Vandal(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 6:
                runs[0].adapters.parameters()[0].data.fill_(torch.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "open", open_and_tell)
        with pytest.raises(NonFiniteError, match="weights after the optimizer of step 6"):
            train(make_config(), TinyDenoiser(), make_data(), tmp_path, Vandal())
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3


def test_an_exception_of_the_host_saves_and_passes(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Host(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 4:
                raise Interrupted

    denoiser = TinyDenoiser()
    with pytest.raises(Interrupted):
        train(make_config(), denoiser, make_data(), tmp_path, Host())
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 4 and (tmp_path / "lora.safetensors").exists()
    assert "forward" not in denoiser.enter.__dict__


@pytest.mark.parametrize("call", [1, 2, 3, 5, 6, 7, 9, 10])
@pytest.mark.parametrize("checkpoint_every", [3, 100])
def test_ctrl_c_inside_a_save_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, checkpoint_every: int
) -> None:
    """At any write of the periodic saves, of the last one, or of the LoRA: what was done is saved all the same."""
    real, calls, reports = os.fsync, [0], Recorder()

    def fsync(descriptor: int) -> None:
        calls[0] += bool(reports.reports)  # not while the run is opened
        if calls[0] == call:
            calls[0] += 1
            raise KeyboardInterrupt
        real(descriptor)

    config = make_config(checkpoint_every=checkpoint_every, probe_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            train(config, TinyDenoiser(), make_data(), tmp_path, reports)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == reports.reports[-1].step
    assert load_lora(tmp_path / "lora.safetensors")[1]["dopsd_step"] == str(checkpoint.step)
    train(config, TinyDenoiser(), make_data(), tmp_path)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    assert saved_bytes(tmp_path) == saved_bytes(tmp_path / "whole")


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_a_run_that_trains_no_image_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, probability: float
) -> None:
    data = TrainingSet([make_pair(0)], anchors=[make_pair(1).student])
    with caplog.at_level(logging.WARNING, "dopsd"):
        train(make_config(steps=1, anchor_probability=probability), TinyDenoiser(), data, tmp_path)
    assert ("anchor_probability is 1: every batch is a prior anchor" in caplog.text) == (probability == 1)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    class Second(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            with pytest.raises(FolderInUse, match="another run is using"):
                train(make_config(), TinyDenoiser(), make_data(), tmp_path)

    assert train(make_config(steps=2), TinyDenoiser(), make_data(), tmp_path, Second()).step == 2
    assert train(make_config(steps=3), TinyDenoiser(), make_data(), tmp_path).step == 3


def test_what_does_not_fit_is_said_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        train(make_config(anchor_probability=0.5, caption_dropout=0.1), TinyDenoiser(), make_data(), tmp_path)
    assert "no anchor captions" in str(caught.value) and "no empty caption" in str(caught.value)
    with pytest.raises(ConfigError, match="bitsandbytes"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        train(make_config(optimizer="adamw8bit"), TinyDenoiser(), make_data(), tmp_path)
    with pytest.raises(ValueError, match="no pairs"):
        TrainingSet([])
    with pytest.raises(ValueError, match="example 0"):
        TrainingSet([make_pair(0)], examples=[Example((1,))])
    with pytest.raises(ValueError, match="different sizes"):
        TrainingSet([make_pair(0), make_pair(1, (3, 2))], examples=[Example((0, 1))])
    same = make_pair(0)
    object.__setattr__(same, "teacher", same.student)
    with caplog.at_level(logging.WARNING, "dopsd"):
        train(make_config(steps=1, objective="sft"), TinyDenoiser(), TrainingSet([same]), tmp_path)
    assert "nothing to learn" in caplog.text
