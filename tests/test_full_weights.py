"""All weights of a network: student, teacher and original are what they should be, and runs are what torch makes."""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dopsd_core.adapters import Full
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.full_weights import FullWeights
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import ConfigError, TrainConfig
from dopsd_core.families import Z_IMAGE
from dopsd_core.memory.activation_checkpointing import checkpointed
from dopsd_core.memory.footprint import estimate
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import OPTIMIZERS, AdamW, Optimizer
from dopsd_core.optimizers.adamw8bit import AdamW8bit
from dopsd_core.optimizers.base import evaluating
from dopsd_core.rollout import euler_step
from dopsd_core.teachers import EmaTeacher, FrozenTeacher, Teacher
from dopsd_core.training.checkpoint import load_checkpoint
from dopsd_core.training.run import Run
from dopsd_core.training.trainer import NoCallbacks, train
from dopsd_core.training.training_set import TrainingSet
from dopsd_core.training.world import Turn
from tests.devices import DEVICE
from tests.forked import forking
from tests.ranks import on_threads
from tests.stopping import StopAt
from tests.test_new_choice import ScheduleFree, Switching
from tests.test_several_processes import assert_same_run
from tests.tiny import (
    TinyDenoiser,
    killable_config,
    killable_data,
    make_config,
    make_data,
    make_pair,
    run_until_call,
    saved_bytes,
)
from tests.toy_denoiser import SIGMAS, ToyDenoiser, ToyNet, assert_near, lora, make_inputs, make_pairs

X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5)).to(DEVICE)
CONDITIONS = [pair.student for pair in make_pairs(2)]


class InDtype(ToyDenoiser):
    """Computes in the dtype of its weights, as networks of diffusers do."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net.to(dtype)
        self.compute_dtype = dtype

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        return x - sigma * velocity(self.net, x, sigma, conditions)


def velocity(net: ToyNet, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
    """[B, C, h, w] fp32, computed in the dtype of the weights."""
    dtype = net.embed.weight.dtype
    features = [condition.features.to(dtype) for condition in conditions]
    batch, channels, height, width = x.shape
    tokens = net.embed(x.to(dtype).flatten(2).mT) + net.time(torch.full((1, 1, 1), sigma, device=x.device, dtype=dtype))
    tokens = tokens + torch.stack([net.text(f.to(x.device)).mean(0) for f in features])[:, None]
    for layer in net.layers:
        tokens = layer(tokens)
    return net.final(tokens).mT.reshape(batch, channels, height, width).float()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def predict(denoiser: ToyDenoiser) -> Tensor:
    with torch.no_grad():
        return denoiser.predict_x0(X, 0.75, CONDITIONS)


def moved(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every weight moved at random, as by a training."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in sorted(state.items())}


def with_weights(net: ToyNet, state: dict[str, Tensor]) -> ToyDenoiser:
    """Another network, with these weights in the dtype of `net`."""
    other = InDtype(net.embed.weight.dtype)
    other.net.load_state_dict(state)
    return other


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["ema", "same", "frozen"])
def test_student_and_teacher_start_as_the_network(dtype: torch.dtype, teacher: str) -> None:
    denoiser = InDtype(dtype)
    base = predict(denoiser)
    with FullWeights(denoiser.network(), teacher).attached() as weights:
        for mode in ("student", "teacher", "off"):
            with weights.use(mode):
                assert torch.equal(predict(denoiser), base), mode


@pytest.mark.parametrize("teacher", ["ema", "same", "frozen"])
def test_each_mode_computes_with_its_weights(dtype: torch.dtype, teacher: str) -> None:
    denoiser = InDtype(dtype)
    base, weights = predict(denoiser), FullWeights(denoiser.network(), teacher)
    student, average = moved(weights.state(), 1), moved(weights.state(), 2)
    weights.load_state("student", student)
    if teacher == "ema":
        weights.load_state("teacher", average)
    wanted = {name: predict(with_weights(denoiser.net, state)) for name, state in (("s", student), ("t", average))}
    teachers = {"ema": wanted["t"], "same": wanted["s"], "frozen": base}
    with weights.attached():
        assert torch.equal(predict(denoiser), wanted["s"])
        with weights.use("off"):
            assert torch.equal(predict(denoiser), base)
            with weights.use("teacher"):
                assert torch.equal(predict(denoiser), teachers[teacher])
            assert torch.equal(predict(denoiser), base)
    assert torch.equal(predict(denoiser), base)
    assert not torch.equal(wanted["s"], base) and not torch.equal(wanted["t"], base)
    assert bool(weights.state("teacher")) == weights.has_teacher == (teacher == "ema")


@pytest.mark.parametrize("teacher", ["ema", "same", "frozen"])
def test_only_the_student_has_gradients(dtype: torch.dtype, teacher: str) -> None:
    denoiser = InDtype(dtype)
    with FullWeights(denoiser.network(), teacher).attached() as weights:
        for mode in ("teacher", "off"):
            with weights.use(mode):
                assert not denoiser.predict_x0(X, 0.5, CONDITIONS).requires_grad, mode
        denoiser.predict_x0(X, 0.5, CONDITIONS).square().mean().backward()
    gradients = [parameter.grad for parameter in weights.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.any()) for g in gradients)
    assert all(p.dtype == torch.float32 for p in weights.parameters())
    assert all(parameter.grad is None for parameter in denoiser.net.parameters())


def test_the_network_gets_its_own_tensors_back(dtype: torch.dtype) -> None:
    denoiser = InDtype(dtype)
    before = dict(denoiser.net.named_parameters())
    facts = {name: (p._version, p.data_ptr(), p.requires_grad, p.clone()) for name, p in before.items()}
    weights = FullWeights(denoiser.network())
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    with pytest.raises(KeyError), weights.attached(), weights.use("teacher"):
        with weights.use("student"):
            denoiser.predict_x0(X, 0.5, CONDITIONS).square().mean().backward()
        optimizer.step()
        weights.update_teacher()
        raise KeyError("an error of the host")
    after = dict(denoiser.net.named_parameters())
    assert not weights.is_attached and list(after) == list(before)
    for name, parameter in after.items():
        assert parameter is before[name]
        version, place, requires_grad, value = facts[name]
        assert (parameter._version, parameter.data_ptr(), parameter.requires_grad) == (version, place, requires_grad)
        assert torch.equal(parameter, value)


def test_a_weight_with_two_paths_is_trained_once() -> None:
    layers = nn.Linear(3, 3), nn.Linear(3, 3)
    net = nn.Sequential(*layers).requires_grad_(False)
    layers[1].weight = layers[0].weight
    weights = FullWeights(net)
    assert list(weights.state()) == ["0.weight", "0.bias", "1.bias"]
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    weights.load_state("student", {name: value + 1 for name, value in weights.state().items()})
    with weights.attached():
        student = net(x)
        assert layers[1].weight is layers[0].weight
    wanted = x
    for layer in layers:
        wanted = F.linear(wanted, layers[0].weight + 1, layer.bias + 1)
    torch.testing.assert_close(student, wanted)


# -- steps, as torch makes them ----------------------------------------------------------------------------------------


def dopsd_steps(weights: FullWeights, denoiser: ToyDenoiser, steps: int, blocks: int = 0) -> None:
    """Steps of D-OPSD, as the trainer makes them."""
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2, weight_decay=0.0)
    with weights.attached(), checkpointed(denoiser.blocks(), blocks):
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            DOPSD(anchor_probability=0.0).backward(make_inputs(denoiser, weights, seed=step))  # type: ignore[arg-type]
            nn.utils.clip_grad_norm_(weights.parameters(), 0.5)
            optimizer.step()
            weights.update_teacher()


def plain_steps(net: ToyNet, steps: int, decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(student, teacher) after the same steps in torch alone: Eq. 7 on the student's own states."""
    masters = {n: nn.Parameter(p.float().clone()) for n, p in net.named_parameters()}
    averages = {n: p.detach().clone() for n, p in masters.items()}
    student, teacher = copy.deepcopy(net).requires_grad_(True), copy.deepcopy(net)
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        inputs = make_inputs(ToyDenoiser(), None, seed=step)  # type: ignore[arg-type]  # the draws alone
        x = inputs.noise
        for sigma, sigma_next in zip(SIGMAS, SIGMAS[1:], strict=False):
            x0 = x - sigma * velocity(student, x, sigma, [pair.student for pair in inputs.pairs])
            with torch.no_grad():
                target = x - sigma * velocity(teacher, x, sigma, [pair.teacher for pair in inputs.pairs])
            (F.mse_loss(x0, target) / (len(SIGMAS) - 1)).backward()
            x = euler_step(x, x0.detach(), sigma, sigma_next)
            for name, parameter in student.named_parameters():  # added up in fp32
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                before = masters[name].grad
                masters[name].grad = gradient.float() if before is None else before + gradient
        nn.utils.clip_grad_norm_(masters.values(), 0.5)
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                averages[name].lerp_(master, 1 - decay)
                student.get_parameter(name).copy_(master)
                teacher.get_parameter(name).copy_(averages[name])
    return {name: master.detach() for name, master in masters.items()}, averages


def test_three_steps_are_those_of_torch(dtype: torch.dtype) -> None:
    """In 16 bits with masters in fp32, one cast per step and gradients that are added up in fp32."""
    denoiser = InDtype(dtype)
    weights = Full().build(denoiser, make_config().teacher, seed=0)
    dopsd_steps(weights, denoiser, 3)
    wanted = plain_steps(denoiser.net, 3, decay=0.9)
    for which, expected in zip(("student", "teacher"), wanted, strict=True):
        state = weights.state(which)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert_near(value, expected[name].cpu(), 1e-6)
            assert not torch.equal(value, denoiser.net.get_parameter(name).float().cpu())


def test_gradient_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    states = []
    for blocks in (0, 1, 2):
        denoiser = InDtype(dtype)
        weights = FullWeights(denoiser.network())
        dopsd_steps(weights, denoiser, 2, blocks)
        states.append(weights.state())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


def test_accumulated_batches_are_one_batch() -> None:
    pairs = [make_pair(number) for number in range(4)]
    for pair in pairs:  # one length, so that the batch is computed alike
        object.__setattr__(pair.student, "features", pair.student.features[:3])
    gradients = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = make_config(adapter="full", batch_size=batch_size, grad_accumulation=accumulation, max_grad_norm=0)
        run = Run(config, TinyDenoiser(), TrainingSet(pairs), Path("unused"))
        with run.adapters.attached():
            for micro in range(accumulation):
                run.gradients.backward(0, Turn(micro))
        gradients.append([parameter.grad for parameter in run.adapters.parameters()])
        assert all(gradient is not None and gradient.abs().max() > 1e-5 for gradient in gradients[-1])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-8)


def test_an_optimizer_with_other_weights_to_sample_with(dtype: torch.dtype) -> None:
    """It writes to `data`, which counts no change; the network computes with these weights all the same."""
    denoiser = InDtype(dtype)
    weights = FullWeights(denoiser.network(), "frozen")
    optimizer = Switching(weights.parameters(), lr=1e-2)
    optimizer.train()
    trained = weights.state()
    with weights.attached():
        base = predict(denoiser)
        with evaluating(optimizer), weights.use("student"):
            assert torch.equal(predict(denoiser), X)  # all weights are zero
        with weights.use("student"):
            assert torch.equal(predict(denoiser), base)
    torch.testing.assert_close(weights.state(), trained, rtol=0, atol=0)


def test_an_optimizer_that_writes_to_the_data_of_its_parameters(dtype: torch.dtype) -> None:
    """Which counts no change; after its step the network computes with the new weights all the same."""
    denoiser = InDtype(dtype)
    weights = FullWeights(denoiser.network(), "same")
    new = moved(weights.state(), 1)
    with weights.attached():
        for (_, value), parameter in zip(sorted(new.items()), _by_name(weights), strict=True):
            parameter.data.copy_(value)
        weights.update_teacher()
        wanted = predict(with_weights(denoiser.net, new))
        assert torch.equal(predict(denoiser), wanted)
        with weights.use("teacher"):
            assert torch.equal(predict(denoiser), wanted)


def _by_name(weights: FullWeights) -> list[nn.Parameter]:
    found = dict(zip(weights.state(), weights.parameters(), strict=True))
    return [found[name] for name in sorted(found)]


# -- runs --------------------------------------------------------------------------------------------------------------


class Narrow(TinyDenoiser):
    """With weights of 16 bits, in which it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        narrow = [Condition(condition.features.bfloat16()) for condition in conditions]
        return super().predict_x0(x.bfloat16(), sigma, narrow).float()


@pytest.mark.parametrize("make", [TinyDenoiser, Narrow])
@pytest.mark.parametrize("teacher", ["ema", "frozen", "same"])
@pytest.mark.parametrize("objective", ["dopsd", "sft", "pso"])
def test_a_resumed_run_is_the_uninterrupted_one(
    make: Callable[[], TinyDenoiser], teacher: str, objective: str, tmp_path: Path
) -> None:
    config = make_config(adapter="full", teacher=teacher, objective=objective, batch_size=2)
    data = make_data(anchors=[make_pair(number, seed=7).student for number in range(3)])
    train(config, make(), data, tmp_path / "whole")
    train(config, make(), data, tmp_path / "cut", StopAt(5))
    result = train(config, make(), data, tmp_path / "cut")
    assert result.step == 12 and result.lora_path == tmp_path / "cut" / "model.safetensors"
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="counts the calls of POSIX file functions")
@pytest.mark.parametrize("number", [7, *(pytest.param(number, marks=pytest.mark.long) for number in (12, 17))])
def test_a_killed_run_resumes(tmp_path: Path, number: int) -> None:
    train(killable_config(8, "full"), TinyDenoiser(), killable_data(), tmp_path / "whole")
    child = forking().Process(target=run_until_call, args=(str(tmp_path / "cut"), 8, "fsync", number, "full"))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    train(killable_config(8, "full"), TinyDenoiser(), killable_data(), tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")


def test_ranks_share_the_batches(tmp_path: Path) -> None:
    config = killable_config(4, "full").replace(grad_accumulation=4)
    train(config, Narrow(), killable_data(), tmp_path / "one")

    def work(world: Any) -> Any:
        return train(config, Narrow(), killable_data(), tmp_path / "two", world=world)

    assert all(result.step == 4 for result in on_threads(2, work))
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)


def test_it_reaches_its_teacher_and_gives_the_network_back(tmp_path: Path) -> None:
    denoiser = Narrow()
    before = {name: (parameter, parameter.clone()) for name, parameter in denoiser.named_parameters()}
    config = make_config(adapter="full", steps=150, teacher="frozen", lr=3e-3, probe_every=50)
    result = train(config, denoiser, make_data(2), tmp_path)
    assert result.start_gaps is not None and result.end_gaps is not None
    assert result.end_gaps.train < 0.5 * result.start_gaps.train
    for name, parameter in denoiser.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_it_trains_inside_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        train(make_config(adapter="full"), Narrow(), make_data(), tmp_path / "in")
    train(make_config(adapter="full"), Narrow(), make_data(), tmp_path / "out")
    assert saved_bytes(tmp_path / "in") == saved_bytes(tmp_path / "out")


@pytest.mark.parametrize("saved_dtype", ["bf16", "fp32"])
def test_the_file_is_the_whole_student(tmp_path: Path, saved_dtype: str) -> None:
    config = make_config(adapter="full", saved_dtype=saved_dtype)
    result = train(config, TinyDenoiser(), make_data(), tmp_path)
    checkpoint, saved = load_checkpoint(tmp_path / "checkpoints"), load_file(result.lora_path)
    assert checkpoint is not None and saved.keys() == TinyDenoiser().state_dict().keys() == checkpoint.lora.keys()
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[saved_dtype]
    assert all(torch.equal(value, checkpoint.lora[name].to(kind)) for name, value in saved.items())
    size = sum(value.nbytes for value in saved.values())
    assert size == config.adapter.file_bytes(sum(value.numel() for value in saved.values()))


def test_the_dtype_of_the_file_may_change_on_resuming(tmp_path: Path) -> None:
    train(make_config(adapter="full"), TinyDenoiser(), make_data(), tmp_path, StopAt(5))
    result = train(make_config(adapter="full", saved_dtype="fp32"), TinyDenoiser(), make_data(), tmp_path)
    assert next(iter(load_file(result.lora_path).values())).dtype == torch.float32


def test_the_sizes_are_those_of_the_network() -> None:
    config, denoiser = make_config(adapter="full"), InDtype()
    weights = config.adapter.build(denoiser, config.teacher, 0)
    sizes = [parameter.numel() for parameter in weights.parameters()]
    assert config.adapter.trained(denoiser) == (len(sizes), sum(sizes))
    assert sum(sizes) == sum(parameter.numel() for parameter in denoiser.net.parameters())
    assert [config.adapter.cast_bytes(*case) for case in ((2, True), (2, False), (4, True))] == [4, 2, 0]


@pytest.mark.parametrize(
    ("dtype", "teacher", "optimizer", "per_weight"),
    [
        (torch.bfloat16, EmaTeacher(), AdamW(), 24),
        (torch.bfloat16, FrozenTeacher(), AdamW(), 18),
        (torch.bfloat16, FrozenTeacher(), AdamW8bit(), 12),
        (torch.float32, EmaTeacher(), AdamW(), 20),
    ],
)
def test_the_planned_memory(dtype: torch.dtype, teacher: Teacher, optimizer: Optimizer, per_weight: int) -> None:
    """Bytes per weight besides the network itself; no weight is cast in a forward."""
    denoiser = InDtype(dtype)
    count = sum(parameter.numel() for parameter in denoiser.net.parameters())
    planned = estimate(
        denoiser, Z_IMAGE, Full(), (16, 5), (16, 8), 0, itemsize=dtype.itemsize, weights_of_teacher=teacher,
        optimizer=optimizer,
    )  # fmt: skip
    assert planned.lora + planned.training == per_weight * count
    held = FullWeights(denoiser.network(), teacher)._weights
    tensors = {
        id(t): t for trained in held for t in (trained.master, trained.student, trained.average, trained.teacher)
    }
    own = sum(value.nbytes for value in tensors.values() if value is not None)
    assert own == (per_weight - 4 - optimizer.bytes_per_parameter) * count
    lora_blocks = estimate(denoiser, Z_IMAGE, lora(), (16, 5), (16, 8), 0, itemsize=dtype.itemsize).blocks
    assert all(
        ours.kept <= theirs.kept and ours.entry == theirs.entry
        for ours, theirs in zip(planned.blocks, lora_blocks, strict=True)
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(config: TrainConfig, denoiser: Any, folder: Path, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        train(config, denoiser, make_data(), folder, NoCallbacks(), **kwargs)
    (problem,) = caught.value.problems
    return problem


def test_a_host_without_plain_weights(tmp_path: Path) -> None:
    class Host:
        def __init__(self) -> None:
            self.inner = TinyDenoiser()
            self.device, self.compute_dtype = self.inner.device, self.inner.compute_dtype
            self.sites, self.blocks, self.predict_x0 = self.inner.sites, self.inner.blocks, self.inner.predict_x0

    problem = refusal(make_config(adapter="full"), Host(), tmp_path)
    assert "which ComfyUI may stream or quantise" in problem and "dopsd_core train --adapter full" in problem
    assert not any(tmp_path.iterdir())


def test_quantised_weights(tmp_path: Path) -> None:
    denoiser = TinyDenoiser()
    denoiser.leave.weight = nn.Parameter(denoiser.leave.weight.to(torch.float8_e4m3fn), requires_grad=False)
    problem = refusal(make_config(adapter="full"), denoiser, tmp_path)
    assert problem == "adapter full trains plain weights, and leave.weight is float8_e4m3fn: leave out --quantise"


def test_a_lora_to_start_from(tmp_path: Path) -> None:
    initial = {"enter.lora_A.weight": torch.zeros(1, 4), "enter.lora_B.weight": torch.zeros(16, 1)}
    assert "cannot start from a LoRA" in refusal(make_config(adapter="full"), TinyDenoiser(), tmp_path, initial=initial)


def test_an_optimizer_of_matrices_alone() -> None:
    with pytest.raises(ConfigError, match="optimizer muon trains matrices only, and adapter full trains norms"):
        make_config(adapter="full", optimizer="muon")


def test_files_along_the_way_are_loras() -> None:
    with pytest.raises(ConfigError, match="save_every keeps LoRA files, and adapter full trains a whole model"):
        TrainConfig(adapter=Full(), save_every=5)


def test_targets_are_no_option_of_it() -> None:
    with pytest.raises(ConfigError, match="targets is an option of adapter lora or dora or lokr"):
        make_config(adapter="full", targets=("enter",))


def test_two_trainings_do_not_share_a_network() -> None:
    denoiser = ToyDenoiser()
    first, second = FullWeights(denoiser.network()), FullWeights(denoiser.network())
    with first.attached(), pytest.raises(RuntimeError, match=r"embed\.weight is not the network's own weight now"):
        second.attach()
    with AdapterSet(denoiser.sites(), lora()).attached(), pytest.raises(RuntimeError, match="adapter set is already"):
        second.attach()
    with second.attached():
        assert second.is_attached


def test_weights_that_do_not_fit() -> None:
    weights = FullWeights(ToyDenoiser().network(), "frozen")
    state = weights.state()
    with pytest.raises(ValueError, match=r"1 missing \['embed.weight'\]"):
        weights.load_state("student", {name: value for name, value in state.items() if name != "embed.weight"})
    with pytest.raises(ValueError, match=r"embed.weight: expected shape \(16, 4\), got \(4, 16\)"):
        weights.load_state("student", {**state, "embed.weight": state["embed.weight"].T})
    with pytest.raises(ValueError, match="mode must be one of"):
        weights.mode = "both"  # type: ignore[assignment]
    torch.testing.assert_close(weights.state(), state, rtol=0, atol=0)


def test_a_schedule_free_run_writes_the_weights_to_sample_with(tmp_path: Path) -> None:
    with OPTIMIZERS.registered(ScheduleFree):
        config = make_config(adapter="full", optimizer="schedule_free", teacher="frozen")
        result = train(config, Narrow(), make_data(), tmp_path)
    assert not any(value.any() for value in load_file(result.lora_path).values())
