"""DoRA and LoKr: the start is the base, the forward is the merged weight, and a run with them resumes exactly."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_core.adapters import ADAPTERS, Dora, Lokr, Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.denoiser import LinearSite, plain_linear_sites
from dopsd_core.families import Z_IMAGE
from dopsd_core.memory.footprint import saved_bytes as planned_bytes
from dopsd_core.optimizers import AdamW
from dopsd_core.options import changed
from dopsd_core.teachers import EmaTeacher
from dopsd_core.training.trainer import train
from tests.devices import DEVICE
from tests.stopping import StopAt
from tests.tiny import TinyDenoiser, make_config, make_data, saved_bytes
from tests.toy_denoiser import ToyDenoiser, ToyNet, assert_near, fuse_qkv, linear, make_pairs

TARGETS = ("layers.*",)
KINDS: dict[str, Lora] = {
    "dora": Dora(rank=3, alpha=6.0, targets=TARGETS),
    "lokr": Lokr(rank=3, alpha=6.0, factor=2, targets=TARGETS),
    "lokr in one piece": Lokr(rank=64, alpha=128.0, factor=2, targets=TARGETS),
}
X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5)).to(DEVICE)
CONDITIONS = [pair.student for pair in make_pairs(2)]


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> Lora:
    return KINDS[request.param]


def predict(denoiser: ToyDenoiser) -> Tensor:
    return denoiser.predict_x0(X, 0.75, CONDITIONS)


def perturbed(state: dict[str, Tensor], seed: int = 0, std: float = 0.3) -> dict[str, Tensor]:
    """Every tensor moved at random, as by a training."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + std * torch.randn(value.shape, generator=generator) for key, value in sorted(state.items())}


def trained_set(config: Lora, denoiser: ToyDenoiser | None = None) -> tuple[ToyDenoiser, AdapterSet]:
    denoiser = denoiser or ToyDenoiser()
    adapters = AdapterSet(denoiser.sites(), config, seed=3, device=DEVICE, teacher=EmaTeacher(decay=0.9))
    adapters.load_state("student", perturbed(adapters.state()))
    return denoiser, adapters


def merged(config: Lora, weight: Tensor, state: dict[str, Tensor], name: str, detach_norm: bool = False) -> Tensor:
    """The weight with the adapter, by the definition of each kind."""
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if isinstance(config, Dora):
        updated = weight + config.scale * own["lora_B.weight"] @ own["lora_A.weight"]
        norms = updated.norm(dim=1, keepdim=True)
        return own["lora_magnitude_vector"][:, None] * updated / (norms.detach() if detach_norm else norms)
    second = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    return weight + config.scale * torch.kron(own["lokr_w1"], second)


def test_every_adapter_but_lora_is_tried_here() -> None:
    assert {name for name, kind in ADAPTERS.items() if not kind.trains_network} - {
        config.name for config in KINDS.values()
    } == {Lora.name}
    assert {len(trained_set(c)[1].state()) for n, c in KINDS.items() if "lokr" in n} == {3 * 12, 2 * 12}


# -- on a network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_student_is_the_base_bit_for_bit(config: Lora, dtype: torch.dtype) -> None:
    denoiser = ToyDenoiser()
    denoiser.net.to(dtype)
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    block = denoiser.net.layers[0]
    base = block(hidden)
    with AdapterSet(denoiser.sites(), config, device=DEVICE).attached() as adapters:
        for mode in ("student", "teacher", "off"):
            with adapters.use(mode):
                assert torch.equal(block(hidden), base), mode


def test_the_student_is_the_merged_weight(config: Lora) -> None:
    denoiser, adapters = trained_set(config)
    net, state = copy.deepcopy(denoiser.net), adapters.state()
    for name in adapters.part_names():
        weight = linear(net, name).weight
        weight.copy_(merged(config, weight.cpu(), state, name))
    with adapters.attached():
        assert_near(predict(denoiser), predict(ToyDenoiser(net)), 1e-4)


def test_gradients_are_those_of_the_merged_weight(config: Lora) -> None:
    """For DoRA with the norm as a constant."""
    denoiser, adapters = trained_set(config)
    leaves = {key: value.to(DEVICE, copy=True).requires_grad_() for key, value in adapters.state().items()}
    weights = {
        f"{name}.weight": merged(config, linear(denoiser.net, name).weight, leaves, name, detach_norm=True)
        for name in adapters.part_names()
    }
    features = [condition.features for condition in CONDITIONS]
    torch.func.functional_call(denoiser.net, weights, (X, 0.75, features)).square().mean().backward()
    with adapters.attached():
        denoiser.net(X, 0.75, features).square().mean().backward()
    gradients = {key: value for key, value in _gradients(adapters).items() if not key.endswith(".dora_scale")}
    assert len(gradients) >= 24
    for key, gradient in gradients.items():
        assert_near(gradient, leaves[key].grad, 1e-4)


def _gradients(adapters: AdapterSet) -> dict[str, Tensor]:
    """By key of the state: the views of a set whose tensors are the gradients."""
    views: dict[str, Tensor] = {}
    for adapter in adapters._adapters:
        of_gradients = adapter.student.mapped(
            lambda tensor: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        )
        views |= of_gradients.views()
    return views


def test_fused_qkv_equals_split(config: Lora) -> None:
    net = ToyNet()
    outcomes = []
    for host in (ToyDenoiser(net), ToyDenoiser(fuse_qkv(net))):
        _, adapters = trained_set(config, host)
        with adapters.attached():
            out = predict(host)
            out.square().mean().backward()
        outcomes.append((adapters.state(), out.detach(), _gradients(adapters)))
    (split_state, split_out, split_grad), (fused_state, fused_out, fused_grad) = outcomes
    assert split_state.keys() == fused_state.keys()
    for key, value in split_state.items():
        torch.testing.assert_close(fused_state[key], value)
    assert_near(fused_out, split_out, 1e-4)
    for key, gradient in split_grad.items():
        assert_near(fused_grad[key], gradient, 1e-4)


def test_the_teacher_is_the_moving_average_of_every_tensor(config: Lora) -> None:
    _, adapters = trained_set(config)
    start, student = adapters.state("teacher"), adapters.state()
    adapters.update_teacher()
    assert not any(key.endswith(".dora_scale") for key in start)
    for key, value in adapters.state("teacher").items():
        torch.testing.assert_close(value, 0.9 * start[key] + 0.1 * student[key])


def test_a_state_loads_back_and_what_does_not_fit_is_refused(config: Lora) -> None:
    _, adapters = trained_set(config)
    state = adapters.state()
    other = AdapterSet(ToyDenoiser().sites(), config, seed=9, device=DEVICE)
    other.load_state("student", state)
    assert all(torch.equal(value, state[key]) for key, value in other.state().items())
    for key in [key for key in state if key.startswith("layers.0.attention.to_q.") and "dora_scale" not in key]:
        with pytest.raises(ValueError, match=f"1 missing.*{key}"):
            other.load_state("student", {name: value for name, value in state.items() if name != key})


def test_a_row_of_zeros_in_the_base_is_no_division_by_zero() -> None:
    denoiser = ToyDenoiser()
    linear(denoiser.net, "layers.0.attention.to_q").weight[3] = 0
    base = predict(denoiser)
    adapters = AdapterSet(denoiser.sites(), KINDS["dora"], device=DEVICE)
    with adapters.attached():
        assert torch.equal(predict(denoiser), base)
        predict(denoiser).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapters.parameters() if p.grad is not None)
    assert all(torch.isfinite(value).all() for value in adapters.state().values())


def test_dora_needs_the_weights_of_the_base(tmp_path: Path) -> None:
    class Streamed(TinyDenoiser):
        def sites(self) -> list[LinearSite]:
            return [replace(site, weight=None) for site in TinyDenoiser.sites(self)]

    sentence = "adapter dora needs the weight of enter, which this model does not give, .*set adapter to lora or lokr"
    with pytest.raises(ValueError, match=sentence):
        train(make_config(adapter="dora"), Streamed(), make_data(), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="adapter dora needs the weight of enter"):
        AdapterSet(Streamed().sites(), Dora(targets=("enter",)))
    train(make_config(adapter="lokr", rank=1, factor=2, steps=1), Streamed(), make_data(), tmp_path / "lokr")


# -- what they cost ----------------------------------------------------------------------------------------------------


def test_the_number_of_parameters_is_that_of_the_set(config: Lora) -> None:
    _, adapters = trained_set(config)
    parts, parameters = config.size(ToyDenoiser().sites())
    assert (parts, parameters) == (12, sum(parameter.numel() for parameter in adapters.parameters()))
    assert all(parameter.ndim == 2 for parameter in adapters.parameters())


def test_what_a_part_saves_for_its_backward_is_counted(config: Lora) -> None:
    tokens = 50
    denoiser, adapters = trained_set(config)
    (site,) = (site for site in denoiser.sites() if site.name == "layers.0.feed_forward.w1")
    x = torch.randn(tokens, 16, device=DEVICE, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() and tensor.numel() % tokens == 0:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel() // tokens
        return tensor

    with adapters.attached(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = site.module(x)
    assert sum(saved.values()) == config.part_activations(16, 24)
    out.sum().backward()


def test_lokr_has_pefts_factors() -> None:
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    for size in (1, 7, 24, 64, 127, 250, 2560, 3840, 10240):
        for factor in (2, 4, 8, 16, 33):
            config = Lokr(rank=4, factor=factor)
            assert config.shape(size, 24).w1[1] == layer.factorization(size, factor)[0]


# -- runs --------------------------------------------------------------------------------------------------------------

FLAT: dict[str, dict[str, Any]] = {
    "dora": {"adapter": "dora", "rank": 2},
    "lokr": {"adapter": "lokr", "rank": 1, "factor": 2},
    "lokr in one piece": {"adapter": "lokr", "rank": 8, "factor": 2},
}


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, optimizer: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = make_config(**FLAT[kind], optimizer=optimizer)
    train(config, TinyDenoiser(), make_data(), tmp_path / "whole")
    train(config, TinyDenoiser(), make_data(), tmp_path / "cut", StopAt(7))
    result = train(config, TinyDenoiser(), make_data(), tmp_path / "cut")
    assert saved_bytes(tmp_path / "cut") == saved_bytes(tmp_path / "whole")
    assert result.end_gaps is not None and result.start_gaps is not None
    assert result.end_gaps.train < result.start_gaps.train


@pytest.mark.parametrize("kind", FLAT)
def test_the_files_of_a_run_fit_the_planned_space(kind: str, tmp_path: Path) -> None:
    config = make_config(**FLAT[kind])
    result = train(config, TinyDenoiser(), make_data(), tmp_path)
    parts, elements = config.adapter.size(TinyDenoiser().sites())
    tensors, derived = config.adapter.tensors_per_part * parts, config.adapter.derived_bytes(TinyDenoiser().sites())
    planned = planned_bytes(elements, tensors, EmaTeacher(), AdamW(), derived)
    assert result.lora_path.stat().st_size <= planned.lora
    assert sum(file.stat().st_size for file in result.checkpoint_path.iterdir()) <= planned.checkpoint


def test_dora_is_planned_with_what_its_files_hold_besides() -> None:
    """Of a layer large enough that no slack for headers hides it."""
    sites = plain_linear_sites(torch.nn.ModuleDict({"leave": torch.nn.Linear(2, 4096)}))
    config = Dora(rank=1, alpha=1.0, targets=("leave",))
    state = AdapterSet(sites, config).state()
    in_file = 2 * sum(value.numel() for key, value in state.items() if ".lora_A" in key or ".lora_B" in key) + 8 * 4096
    _, elements = config.size(sites)
    assert 2 * elements + config.derived_bytes(sites) == in_file


def test_the_options_are_declared_once_and_kept_over_a_change_of_kind() -> None:
    config = make_config(adapter="lokr", rank=8, factor=16)
    assert config.adapter == Lokr(rank=8, alpha=16.0, factor=16, targets=("enter", "leave"))
    assert changed(config, {"adapter": "dora"}).adapter == Dora(rank=8, alpha=16.0, targets=("enter", "leave"))
    assert Z_IMAGE.key_prefix == "transformer."
