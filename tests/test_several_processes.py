"""Several processes make the same run as one: the same LoRA, however many there are and however they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_core.adapters.lora_file import load_lora
from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.files.disk import DiskError
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.log import StepReport, read_log
from dopsd_core.training.probe import Probe
from dopsd_core.training.trainer import NoCallbacks, PeerError, train
from dopsd_core.training.world import Peers
from tests.drawn_previews import Draws
from tests.ranks import ThreadWorld, on_processes, on_threads, run_kind
from tests.stopping import StopAt
from tests.tiny import TinyDenoiser, killable_config, killable_data, make_config, make_data, saved_bytes

STEPS = 6


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, config: TrainConfig, world: Any = None, callbacks: Any = None, data: Any = None) -> Any:
    return train(config, TinyDenoiser(), data or killable_data(), folder, callbacks, world=world)


def on_ranks(size: int, folder: Path, config: TrainConfig, **kwargs: Any) -> list[Any]:
    return on_threads(size, lambda world: run(folder, config, world, **kwargs))


def student(folder: Path) -> torch.Tensor:
    """All weights of the newest checkpoint's student, fp32."""
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return torch.cat([value.flatten() for _, value in sorted(checkpoint.lora.items())])


def assert_same_run(folder: Path, expected: Path, tolerance: float = 1e-6) -> None:
    ours, theirs = student(folder), student(expected)
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    logs = [read_log(place / "train.jsonl") for place in (folder, expected)]
    assert [report.step for report in logs[0]] == [report.step for report in logs[1]]
    for report, other in zip(*logs, strict=True):
        assert report.anchors == other.anchors and report.lr == other.lr
        for name in ("loss", "grad_norm", "relative_gap"):
            value, wanted = getattr(report, name), getattr(other, name)
            assert value == (None if wanted is None else pytest.approx(wanted, rel=1e-4))


# -- the same run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_accumulated_batches_of_one_process(tmp_path: Path, size: int) -> None:
    config = killable_config(STEPS).replace(grad_accumulation=4)
    run(tmp_path / "one", config)
    results = on_ranks(size, tmp_path / "many", config)
    assert all(result.step == STEPS and not result.stopped for result in results), results
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_where_each_rank_has_one_backward_the_bits_are_the_same(tmp_path: Path) -> None:
    """Two gradients have one sum; with more of them the order of adding differs."""
    config = make_config(steps=STEPS, grad_accumulation=2, grad_steps=1)
    run(tmp_path / "one", config, data=make_data())
    on_ranks(2, tmp_path / "two", config, data=make_data())
    assert saved_bytes(tmp_path / "two") == saved_bytes(tmp_path / "one")


def test_a_gradient_that_one_rank_lacks_is_zero_there() -> None:
    """So that the others' gradients are added to those of the same weights."""

    def work(world: ThreadWorld) -> list[list[float]]:
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        weights[1 + world.rank].grad = torch.tensor([1.0, 2.0]) + world.rank
        Peers(world).sum_gradients(weights)
        return [[] if weight.grad is None else weight.grad.tolist() for weight in weights]

    assert on_threads(2, work) == [[[0, 0], [1, 2], [2, 3]]] * 2


def test_in_bf16_and_fp16_the_ranks_agree(tmp_path: Path) -> None:
    """fp16 also scales the losses, and repeats a step that overflowed on any rank."""
    for dtype in (torch.bfloat16, torch.float16):
        folder, config = tmp_path / str(dtype), killable_config(STEPS)

        def low(world: Any, folder: Path, config: TrainConfig = config, dtype: torch.dtype = dtype) -> Any:
            return train(config, Narrow(dtype), killable_data(), folder, world=world)

        low(None, folder / "one")
        results = on_threads(2, lambda world, folder=folder, low=low: low(world, folder / "two"))
        assert all(result.step == STEPS for result in results), results
        assert_same_run(folder / "two", folder / "one", 1e-5)


class Narrow(TinyDenoiser):
    """Says that it computes in `dtype`; so fp16's loss scale is on, whose powers of two change no bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._dtype


def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Also in the other direction, and from a stop; the steps before do not matter."""
    config = killable_config(STEPS).replace(grad_accumulation=4)
    run(tmp_path / "one", config)
    for number, sizes in enumerate([(2, 1, 4), (1, 4, 2)]):
        folder = tmp_path / str(number)
        for steps, size in zip((2, 4, STEPS), sizes, strict=True):
            results = on_ranks(size, folder, config.replace(steps=STEPS), callbacks=StopAt(steps))
            assert all(getattr(result, "step", None) == steps for result in results), results
        assert_same_run(folder, tmp_path / "one")


def test_the_number_of_ranks_is_no_part_of_the_configuration(tmp_path: Path) -> None:
    config = killable_config(4)
    on_ranks(2, tmp_path, config)
    assert TrainConfig.from_json((tmp_path / "config.json").read_text(encoding="utf-8")) == config


# -- one writer --------------------------------------------------------------------------------------------------------


def test_rank_0_alone_writes(tmp_path: Path) -> None:
    recorders = [Recorder() for _ in range(3)]
    config = killable_config(4).replace(grad_accumulation=3, preview_every=1)
    on_threads(3, lambda world: run(tmp_path, config, world, recorders[world.rank]))
    assert [recorder.previews for recorder in recorders] == [[0, 1, 2, 3, 4]] * 3
    for figure in ("loss", "relative_gap", "heldout_relative_gap"):
        values = [[getattr(report, figure) for report in recorder.reports] for recorder in recorders]
        assert values[0] == values[1] == values[2] and values[0][-1] is not None
    assert [
        json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [0, 1, 2, 3, 4]


class Recorder(NoCallbacks):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.previews: list[int] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_preview(self, step: int, adapters: Any) -> None:
        self.previews.append(step)


# -- shared work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "prompts"), [(2, 3), (4, 3), (4, 1), (3, 4)])
def test_the_ranks_share_previews_and_the_gap_in_the_bits_of_one_process(
    tmp_path: Path, size: int, prompts: int
) -> None:
    """Nobody waits for rank 0: each draws and measures its share, also where that does not come out even."""

    def work(world: Any) -> tuple[Any, list[bytes], int, int]:
        denoiser, config = TinyDenoiser(), killable_config(STEPS).replace(probe_pairs=3)
        weights = config.adapter.build(denoiser, config.teacher, config.seed)
        moved = torch.Generator().manual_seed(1)
        for role in ("student", "teacher"):
            state = {name: torch.randn(v.shape, generator=moved) for name, v in weights.state(role).items()}
            weights.load_state(role, state)
        with weights.attached():
            gaps = Probe(config, denoiser, weights, killable_data(), Peers(world)).measure()
            measured = denoiser.calls
            draws = Draws(tmp_path / str(world is not None), denoiser, world, prompts)
            sheets = [draws.preview.write(step, weights) for step in (1, 2)]
        return gaps, [sheet.tobytes() for sheet in sheets if sheet], measured, draws.model.drawn

    before = torch.random.get_rng_state()  # the threads share one: only where there is one can it be compared
    gaps, sheets, forwards, drawn = work(None)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn == 5 * prompts and len(sheets) == 2
    ranks = on_threads(size, work)
    assert [rank[0] for rank in ranks] == [gaps] * size
    assert [rank[1] for rank in ranks] == [sheets] + [[]] * (size - 1)
    assert sum(rank[2] for rank in ranks) == forwards and sum(rank[3] for rank in ranks) == drawn
    most = -(-3 * prompts // size) + -(-2 * prompts // size)  # the untouched model is drawn once
    assert max(rank[3] for rank in ranks) <= most
    assert max(rank[2] for rank in ranks) == forwards // 4 * -(-4 // size)  # three pairs and the unseen prompt


class RoundingSwitch(torch.optim.SGD):
    """Schedule-free: its weights for evaluation are others, and the way back rounds."""

    def eval(self) -> None:
        self._scale(1 / 3)

    def train(self) -> None:
        self._scale(3.0)

    def _scale(self, factor: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(factor)


def test_the_ranks_keep_equal_weights_where_measuring_rounds_them(tmp_path: Path) -> None:
    custom = {"optimizer": "custom", "custom_path": f"{__name__}:RoundingSwitch", "custom_lr": 1e-2}
    config = make_config(steps=STEPS, grad_accumulation=2, probe_every=1, preview_every=STEPS, **custom)
    kept = [Keeps(), Keeps()]
    results = on_threads(2, lambda world: run(tmp_path, config, world, kept[world.rank], make_data()))
    assert all(getattr(result, "step", 0) == STEPS for result in results), results
    assert kept[0].weights and all(torch.equal(kept[1].weights[name], w) for name, w in kept[0].weights.items())


class Keeps(NoCallbacks):
    """Keeps the student's weights at the last preview."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_preview(self, step: int, adapters: Any) -> None:
        self.weights = {name: weight.clone() for name, weight in adapters.state().items()}


def test_a_sheet_that_cannot_be_written_ends_all(tmp_path: Path) -> None:
    """Here a file is in the way."""
    (tmp_path / "previews").write_bytes(b"")
    config = killable_config(STEPS).replace(preview_every=2)

    def work(world: ThreadWorld) -> Any:
        denoiser = TinyDenoiser()
        return train(config, denoiser, killable_data(), tmp_path, Draws(tmp_path, denoiser, world), world=world)

    results = on_threads(2, work)
    assert isinstance(results[0], DiskError) and isinstance(results[1], PeerError), results
    assert f"{tmp_path / 'previews'} could not be written: File exists" in str(results[0])


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_rank_that_fails_inside_a_preview_ends_all(tmp_path: Path, kind: Callable[[str], Any]) -> None:
    config = killable_config(STEPS).replace(preview_every=2, checkpoint_every=100)

    def work(world: ThreadWorld) -> Any:
        denoiser = TinyDenoiser()
        draws = Draws(tmp_path, denoiser, world)
        if world.rank == 1:
            draws.model.decode = lambda latents: fail(denoiser)  # type: ignore[method-assign]
        return train(config, denoiser, killable_data(), tmp_path, draws, world=world)

    def fail(denoiser: TinyDenoiser) -> Any:
        raise kind("the decoder is gone")

    results = on_threads(2, work)
    assert type(results[1]) is kind and type(results[0]) is PeerError, results
    assert "process 1 of 2 failed: the decoder is gone" in str(results[0])


# -- ending together ---------------------------------------------------------------------------------------------------


def test_a_stop_on_any_rank_stops_all(tmp_path: Path) -> None:
    config = killable_config(STEPS)

    def work(world: ThreadWorld) -> Any:
        return run(tmp_path, config, world, StopAt(3) if world.rank == 1 else None)

    results = on_threads(2, work)
    assert [(result.step, result.stopped) for result in results] == [(3, True)] * 2
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3


class Fails(NoCallbacks):
    """Raises in a hook, at a step."""

    def __init__(self, hook: str, step: int, error: BaseException) -> None:
        self._hook, self._step, self._error = hook, step, error
        self._reached = 0

    def on_step(self, report: StepReport) -> None:
        self._reached = report.step
        self._fail("on_step")

    def on_preview(self, step: int, adapters: Any) -> None:
        self._fail("on_preview")

    def should_stop(self) -> bool:
        self._fail("should_stop")
        return False

    def _fail(self, hook: str) -> None:
        if hook == self._hook and self._reached >= self._step:
            raise self._error


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", ["on_step", "on_preview", "should_stop"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_on_any_rank_ends_all(tmp_path: Path, rank: int, hook: str, kind: Callable[[str], Any]) -> None:
    config = killable_config(STEPS).replace(preview_every=2, checkpoint_every=100)

    def work(world: ThreadWorld) -> Any:
        failing = Fails(hook, 2, kind("the screen is gone")) if world.rank == rank else None
        return run(tmp_path, config, world, failing)

    results = on_threads(2, work)
    assert type(results[rank]) is kind
    assert type(results[1 - rank]) is PeerError
    assert f"process {rank} of 2 failed: the screen is gone" in str(results[1 - rank])
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 2, "rank 0 saves the state before it leaves"


def test_an_error_in_a_batch_of_one_rank_ends_all(tmp_path: Path) -> None:
    def work(world: ThreadWorld) -> Any:
        denoiser = TinyDenoiser()
        denoiser.poison_at = 20 if world.rank == 1 else None
        return train(make_config(steps=STEPS, grad_accumulation=2), denoiser, make_data(), tmp_path, world=world)

    results = on_threads(2, work)
    assert all("the loss of step 2 is nan" in str(result) for result in results), results


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_before_the_first_step_ends_all(tmp_path: Path, rank: int) -> None:
    def work(world: ThreadWorld) -> Any:
        initial = {"nowhere.lora_A.weight": torch.zeros(1, 1)} if world.rank == rank else None
        config = killable_config(STEPS)
        return train(config, TinyDenoiser(), killable_data(), tmp_path, initial=initial, world=world)

    results = on_threads(2, work)
    assert isinstance(results[rank], ValueError) and isinstance(results[1 - rank], PeerError), results


def test_a_full_disk_on_rank_0_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dopsd_core.training.run_folder import RunFolder

    def full(*args: Any) -> Any:
        raise DiskError("the disk is full", True)

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    results = on_ranks(2, tmp_path, killable_config(STEPS))
    assert isinstance(results[0], DiskError) and isinstance(results[1], PeerError), results
    assert "the disk is full" in str(results[1])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_batches_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    results = on_ranks(2, tmp_path, make_config(grad_accumulation=3))
    for result in results:
        assert isinstance(result, ConfigError)
        assert "grad_accumulation is 3" in str(result) and "set it to a multiple of 2" in str(result)


@pytest.mark.parametrize("what", ["the configuration", "the dataset", "the model"])
def test_ranks_that_disagree_are_refused(tmp_path: Path, what: str) -> None:
    def work(world: ThreadWorld) -> Any:
        other = world.rank == 1
        config = killable_config(STEPS + 1 if other and what == "the configuration" else STEPS)
        data = make_data(6) if other and what == "the dataset" else killable_data()
        facts = {"dopsd_base_fingerprint": str(other and what == "the model")}
        config = config.replace(objective=config.objective.without_anchors())
        return train(config, TinyDenoiser(), data, tmp_path, facts=facts, world=world)

    for result in on_threads(2, work):
        assert isinstance(result, ValueError) and f"disagree about {what}" in str(result), result
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_rank_that_is_lost_is_reported() -> None:
    class Broken:
        rank, size = 0, 2

        def gather(self, value: Any) -> list[Any]:
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    peers = Peers(Broken())  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="another process of this run was lost.*Connection closed"):
        peers.all(lambda: 1)


# -- real processes ----------------------------------------------------------------------------------------------------


def test_processes_on_gloo_make_the_same_run(tmp_path: Path) -> None:
    run(tmp_path / "one", killable_config(STEPS))
    assert on_processes(tmp_path / "two", STEPS, 2) == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("killed", [(-1, 4), (4, -1), (4, 4)], ids=["rank 1", "rank 0", "all"])
def test_killed_processes_resume(tmp_path: Path, killed: tuple[int, int]) -> None:
    """The others end too, and the run resumes to the same LoRA, on two ranks or one."""
    run(tmp_path / "one", killable_config(STEPS))
    codes = on_processes(tmp_path / "two", STEPS, 2, killed)
    for code, step in zip(codes, killed, strict=True):
        assert code == (-9 if step > 0 else 1)
    assert read_log(tmp_path / "two" / "train.jsonl")[-1].step in (4, 5)
    if killed == (4, 4):
        run(tmp_path / "two", killable_config(STEPS))
    else:
        assert on_processes(tmp_path / "two", STEPS, 2) == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert load_lora(tmp_path / "two" / "lora.safetensors")[1]["dopsd_step"] == str(STEPS)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "adamw8bit"])
def test_four_processes_on_gloo_make_the_same_run(tmp_path: Path, kind: str) -> None:
    """Also where the network computes in bf16, and where the optimizer keeps its moments in 8 bits."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    run_kind(kind, tmp_path / "one", STEPS)
    assert on_processes(tmp_path / "four", STEPS, 4, kind=kind) == [0] * 4
    assert_same_run(tmp_path / "four", tmp_path / "one", {"fp32": 1e-6, "bf16": 1e-5, "adamw8bit": 1e-3}[kind])
    assert load_lora(tmp_path / "four" / "lora.safetensors")[1]["dopsd_step"] == str(STEPS)


@pytest.mark.parametrize("kind", ["bf16", "adamw8bit"])
def test_four_killed_processes_resume_on_two(tmp_path: Path, kind: str) -> None:
    """The moments in 8 bits come from the checkpoint in their bits."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    run_kind(kind, tmp_path / "one", STEPS)
    codes = on_processes(tmp_path / "four", STEPS, 4, (4, 4, 4, 4), kind)
    assert codes == [-9] * 4 and read_log(tmp_path / "four" / "train.jsonl")[-1].step in (4, 5)
    assert on_processes(tmp_path / "four", STEPS, 2, kind=kind) == [0, 0]
    assert_same_run(tmp_path / "four", tmp_path / "one", {"bf16": 1e-5, "adamw8bit": 1e-3}[kind])


def test_moments_in_8_bits_resume_in_one_process_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run_kind("adamw8bit", tmp_path / "one", STEPS)
    run_kind("adamw8bit", tmp_path / "two", STEPS, StopAt(3))
    run_kind("adamw8bit", tmp_path / "two", STEPS)
    checkpoint = load_checkpoint(tmp_path / "two" / "checkpoints")
    assert checkpoint is not None and any(value.dtype == torch.uint8 for value in checkpoint.optimizer.values())
    assert torch.equal(student(tmp_path / "two"), student(tmp_path / "one"))
