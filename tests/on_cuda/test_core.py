"""The core on a CUDA device, with the demo model: the same training as on a CPU, and what a device alone can get wrong.

Run by `make test-cuda` on the pretend device, whose kernels are the CPU's: what differs was computed from other bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import device
from pretend_cuda.watch import watching
from safetensors.torch import load_file
from torch import Tensor

from dopsd_core.config import TrainConfig
from dopsd_core.data.dataset import Pair, read_dataset
from dopsd_core.data.images import load_image
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.demo.settings import demo_config
from dopsd_core.demo.world import IMAGE_SIZE
from dopsd_core.families import Z_IMAGE
from dopsd_core.memory import activation_checkpointing
from dopsd_core.memory.checkpoint_plan import INPUT, Checkpointing
from dopsd_core.options import changed
from dopsd_core.rollout import sample
from dopsd_core.standalone.hosts.demo import DemoModel, load_demo_model, with_lora
from dopsd_core.training.log import StepReport
from dopsd_core.training.rng import make_generator
from dopsd_core.training.run import Run
from dopsd_core.training.trainer import Callbacks, NoCallbacks, TrainResult, train
from dopsd_core.training.training_set import TrainingSet, build_training_set

CONFIG = changed(demo_config(), {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "probe_every": 2, "warmup": 0})
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen teacher": {"teacher": "frozen"},
    "the student as teacher": {"teacher": "same"},
    "velocity": {"loss": "velocity"},
    "two of the steps": {"grad_steps": 2},
    "accumulation": {"grad_accumulation": 2, "batch_size": 1},
    "caption dropout": {"caption_dropout": 0.5},
    "anchors alone": {"anchor_probability": 1.0},
    "cosine, no clipping, decay": {"schedule": "cosine", "max_grad_norm": 0.0, "weight_decay": 0.1},
    "sft": {"objective": "sft"},
    "sft on the grid": {"objective": "sft", "sft_sigmas": "grid"},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Pair]:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(make_concept(0), folder)
    return read_dataset(folder, pixel_budget=IMAGE_SIZE**2, multiple=Z_IMAGE.pixel_multiple, trigger="ohwx").pairs


@pytest.fixture(scope="module")
def on_cpu() -> DemoModel:
    return load_demo_model()


@pytest.fixture(scope="module")
def on_cuda() -> DemoModel:
    return load_demo_model(device="cuda")


@pytest.fixture(scope="module")
def data(pairs: Sequence[Pair], on_cpu: DemoModel) -> TrainingSet:
    return build_training_set(
        pairs, on_cpu.encoder, trigger="ohwx", caption_dropout=True, anchors=True, anchor_prompts=["a badge"],
        heldout_caption="a [V] badge, left",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(on_cuda: DemoModel, data: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA of a run of `CONFIG` on the device."""
    return train(CONFIG, on_cuda.denoiser, data, tmp_path_factory.mktemp("whole")).lora_path


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight, over the largest weight."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    off = max(float((a[key] - b[key]).abs().max()) for key in a)
    return off / max(float(value.abs().max()) for value in b.values())


def same(one: Path, other: Path) -> bool:
    return largest_difference(one, other) == 0


# -- encoding and sampling --------------------------------------------------------------------------------------------


def test_the_encoder_reads_the_same(on_cpu: DemoModel, on_cuda: DemoModel, pairs: Sequence[Pair]) -> None:
    image = load_image(pairs[0].image_path, pairs[0].bucket)

    def encoded(model: DemoModel) -> list[Tensor]:
        encoder = model.encoder
        conditions = [encoder.encode_text("a badge"), encoder.encode_image_text(image, "a badge")]
        return [*(condition.features.cpu() for condition in conditions), encoder.encode_latent(image).cpu()]

    for here, there in zip(encoded(on_cuda), encoded(on_cpu), strict=True):
        assert torch.allclose(here, there, atol=1e-4)


def test_a_training_set_is_encoded_on_the_device(on_cpu: DemoModel, on_cuda: DemoModel, pairs: Sequence[Pair]) -> None:
    here, there = (build_training_set(pairs, model.encoder, trigger="ohwx") for model in (on_cuda, on_cpu))
    for ours, theirs in zip(here.pairs, there.pairs, strict=True):
        assert ours.student.features.device.type == "cpu"  # so that it takes no room on the card
        assert torch.allclose(ours.student.features, theirs.student.features, atol=1e-4)


def test_samples_with_a_lora_are_the_same(on_cpu: DemoModel, on_cuda: DemoModel, whole: Path) -> None:
    condition = on_cpu.encoder.encode_text("a badge")
    noise = torch.randn(2, *Z_IMAGE.latent_shape(64, 64), generator=make_generator(0, "samples"))

    def drawn(model: DemoModel) -> Tensor:
        with with_lora(model.denoiser, whole):
            start = noise.to(model.denoiser.device)
            latents = sample(model.denoiser, [condition, condition], start, Z_IMAGE.sigmas(4, 64, 64))
        return model.encoder.decode(latents).cpu()

    assert torch.allclose(drawn(on_cuda), drawn(on_cpu), atol=1e-3)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_is_the_cpus(
    on_cpu: DemoModel, on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, name: str
) -> None:
    config = changed(CONFIG, {"steps": 2, **VARIANTS[name]})
    here, there = (train(config, m.denoiser, data, tmp_path / n) for m, n in ((on_cuda, "cuda"), (on_cpu, "cpu")))
    assert largest_difference(here.lora_path, there.lora_path) < 1e-2


@pytest.mark.parametrize("blocks", [2, 99])
def test_recomputing_changes_no_bit(
    on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, whole: Path, blocks: int
) -> None:
    run = train(CONFIG, on_cuda.denoiser, data, tmp_path, checkpointing=blocks)
    assert same(run.lora_path, whole)


class StopAfter(NoCallbacks):
    """Asks to stop, or dies, after a step."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self._step, self._error, self._done = step, error, 0

    def on_step(self, report: StepReport) -> None:
        self._done = report.step
        if self._error is not None and self._done == self._step:
            raise self._error

    def should_stop(self) -> bool:
        return self._error is None and self._done >= self._step


def test_stopped_and_resumed_is_never_stopped(
    on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, whole: Path
) -> None:
    assert train(CONFIG, on_cuda.denoiser, data, tmp_path, StopAfter(1)).stopped
    assert same(train(CONFIG, on_cuda.denoiser, data, tmp_path).lora_path, whole)


def test_killed_and_resumed_is_never_killed(on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, on_cuda.denoiser, data, tmp_path, StopAfter(2, KeyboardInterrupt()))
    assert same(train(CONFIG, on_cuda.denoiser, data, tmp_path).lora_path, whole)


def test_a_run_of_the_device_resumes_on_a_cpu(
    on_cpu: DemoModel, on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, whole: Path
) -> None:
    train(CONFIG, on_cuda.denoiser, data, tmp_path, StopAfter(1))
    run = train(CONFIG, on_cpu.denoiser, data, tmp_path)
    assert run.step == CONFIG.steps and largest_difference(run.lora_path, whole) < 1e-2


def test_a_run_starts_from_a_lora(on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, whole: Path) -> None:
    initial = CONFIG.adapter.imported(load_file(whole), on_cuda.denoiser.sites()).tensors
    run = train(CONFIG, on_cuda.denoiser, data, tmp_path, initial=initial)
    assert run.step == CONFIG.steps and 0 < largest_difference(run.lora_path, whole) < 2


# -- the host and the device's memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"anchor_probability": 1.0}, {"batch_size": 4}], ids=["plain", "anchors", "4"])
def test_two_waits_per_optimizer_step_and_none_in_the_backward(
    on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """diffusers' network has waits of its own."""
    config = changed(CONFIG, {"probe_every": 0, "anchor_probability": 0.0, **changes})
    with watching(Run, "make_step") as watches:
        train(config, on_cuda.denoiser, data, tmp_path)
    for watch in watches[1:]:
        waits = watch.syncs()
        ours = sum(count for event, count in waits.items() if "standalone/hosts/demo.py" not in event.place)
        assert ours <= 2 and not watch.syncs(in_backward=True), watch.describe(waits)


@pytest.mark.parametrize("has_inputs", [False, True], ids=["products", "products and inputs"])
def test_offloading_takes_memory_off_the_card_without_a_wait(
    on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, has_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same LoRA; copies from pinned memory; less at the peak than with the same products on the card."""
    monkeypatch.setattr(activation_checkpointing, "WINDOW", 2**18)  # bytes on their way; more than all of the demo's
    config = changed(CONFIG, {"probe_every": 0, "anchor_probability": 0.0, "batch_size": 4})
    blocks = on_cuda.denoiser.blocks()
    kept = Checkpointing.keeping(len(blocks), (site.name for site in on_cuda.denoiser.sites())).kept
    in_ram = tuple(names | {INPUT} if has_inputs else names for names in kept)
    peaks, waits, found = [], [], []
    for number, plan in enumerate((Checkpointing(kept), Checkpointing(kept, in_ram))):
        device.reset()
        before = device.counts().live_bytes
        with watching(Run, "make_step") as watches:
            run = train(config, on_cuda.denoiser, data, tmp_path / str(number), checkpointing=plan)
        peaks.append(device.counts().peak_bytes - before)
        waits.append([watch.syncs().total() for watch in watches[1:]])
        found.append(load_file(run.lora_path))
        assert not watches[-1].syncs(in_backward=True), watches[-1].describe(watches[-1].syncs())
        kinds = {event.kind for event in watches[-1].events if "activation_offloading" in event.place}
        assert kinds == ({"upload from pinned memory", "download"} if number else set())
    assert waits[0] == waits[1] and peaks[1] < 0.9 * peaks[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_that_is_out_of_memory_keeps_its_steps(
    on_cuda: DemoModel, data: TrainingSet, tmp_path: Path, whole: Path
) -> None:
    class Fills(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            if report.step == 2:
                room.__enter__()

    room = device.limited(4 << 20)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train(CONFIG, on_cuda.denoiser, data, tmp_path, Fills())
    finally:
        room.__exit__(None, None, None)
    assert same(resumed(CONFIG, on_cuda, data, tmp_path, at=2).lora_path, whole)


def resumed(config: TrainConfig, model: DemoModel, data: TrainingSet, folder: Path, at: int) -> TrainResult:
    """The resumed run, which was stopped after so many steps."""
    first: list[int] = []

    class Asks(NoCallbacks):
        def on_step(self, report: StepReport) -> None:
            first.append(report.step)

    callbacks: Callbacks = Asks()
    run = train(config, model.denoiser, data, folder, callbacks)
    assert first[0] == at + 1
    return run


def test_nothing_stays_on_the_card(on_cuda: DemoModel, data: TrainingSet, tmp_path: Path) -> None:
    train(CONFIG, on_cuda.denoiser, data, tmp_path / "one")
    before = device.counts().live_bytes
    train(CONFIG, on_cuda.denoiser, data, tmp_path / "another")
    assert device.counts().live_bytes <= before
