"""Activations in RAM between forward and backward: the same bits, no memory left behind, no more on the device."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.counters import LiveBytes
from dopsd_core import host_memory
from dopsd_core.activation_offloading import Offloading
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.frozen_linear import frozen_linear
from dopsd_core.conditioning.encode import Condition
from dopsd_core.config import TrainConfig
from dopsd_core.denoiser import plain_linear_sites
from dopsd_core.families import FLUX2_KLEIN
from dopsd_core.host_memory import HostPool
from dopsd_core.kept_products import ATTENTION
from dopsd_core.memory import activation_checkpointing, checkpoint_plan
from dopsd_core.memory.activation_checkpointing import block_bytes, checkpointed
from dopsd_core.memory.checkpoint_plan import INPUT, BlockBytes, Checkpointing, peak_bytes, plan_checkpointing
from dopsd_core.memory.footprint import Footprint
from dopsd_core.memory.ram_budget import offloading_ram, why_not_offloaded
from dopsd_core.training.trainer import train
from dopsd_core.training.world import Peers

from .devices import DEVICE
from .test_checkpointing import InPlace, Repeated, WritesIntoProducts, sizes, z_image_with_lora
from .tiny import TinyDenoiser, make_config, make_data, saved_bytes
from .toy_denoiser import assert_near, randomise

Case = tuple[Any, AdapterSet, Callable[[], torch.Tensor], list[BlockBytes]]
SLAB = 2**22


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_SLAB", SLAB)


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """The memory in RAM of all pools that are made from here on."""
    found: list[weakref.ref[torch.Tensor]] = []

    class Slab(host_memory._Slab):
        def __init__(self, memory: torch.Tensor) -> None:
            super().__init__(memory)
            found.append(weakref.ref(memory))

    monkeypatch.setattr(host_memory, "_Slab", Slab)
    return found


def klein_with_lora() -> Case:
    """diffusers' FLUX.2-klein of two blocks of each kind, on 64 image and 24 text tokens."""
    from dopsd_core.standalone.hosts.klein import klein

    torch.manual_seed(0)
    denoiser = klein(
        2, 2, 2, 12, attention_head_dim=32, axes_dims_rope=(8, 8, 8, 8), in_channels=8, timestep_guidance_channels=16
    )
    torch.nn.Module.to(denoiser.transformer, DEVICE).requires_grad_(False)
    config = FLUX2_KLEIN.lora_config(4)
    adapters = AdapterSet(denoiser.sites(), config, device=DEVICE)
    randomise(adapters)
    x, text = torch.randn(1, 8, 8, 8, device=DEVICE), Condition(torch.randn(24, 12, device=DEVICE))
    predicted = block_bytes(denoiser.blocks(), denoiser.sites(), FLUX2_KLEIN, config, 64, 24, itemsize=4)
    return denoiser, adapters, lambda: denoiser.predict_x0(x, 0.5, [text]), predicted


NETWORKS: dict[str, Callable[[], Case]] = {"z_image": lambda: z_image_with_lora(2), "klein": klein_with_lora}


def products_in_ram(blocks: list[BlockBytes]) -> Checkpointing:
    kept = Checkpointing.selective(blocks).kept
    return Checkpointing(kept, kept)


def some_in_ram(blocks: list[BlockBytes]) -> Checkpointing:
    """Every other product, and the inputs of every other block; others on the device, and others computed again."""
    names = [[product.name for product in block.products] for block in blocks]
    kept = tuple(frozenset(all_[: len(all_) - 2] + [ATTENTION]) for all_ in names)
    ram = tuple(frozenset(sorted(some)[::2]) | ({INPUT} if n % 2 else set()) for n, some in enumerate(kept))
    return Checkpointing(kept, ram)


def attention_in_ram(blocks: list[BlockBytes]) -> Checkpointing:
    only = (frozenset({ATTENTION}),) * len(blocks)
    return Checkpointing(only, only)


HOW: dict[str, Callable[[list[BlockBytes]], Checkpointing]] = {
    "products": products_in_ram,
    "products and inputs": Checkpointing.offloaded,
    "some": some_in_ram,
    "attention": attention_in_ram,
}


def gradients(case: Case, plan: Checkpointing | int, steps: int = 1) -> list[torch.Tensor]:
    denoiser, adapters, forward, _ = case
    with adapters.attached(), checkpointed(denoiser.blocks(), plan):
        for _ in range(steps):
            for parameter in adapters.parameters():
                parameter.grad = None
            forward().square().mean().backward()
    return [parameter.grad for parameter in adapters.parameters() if parameter.grad is not None]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("window", [2**28, 2**14], ids=["", "narrow window"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("network", NETWORKS)
def test_no_bit_of_the_gradients_changes(network: str, how: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing, "WINDOW", window)
    case = NETWORKS[network]()
    wanted = gradients(case, 0)
    assert wanted and all(grad.abs().max() > 0 for grad in wanted)
    assert same(gradients(case, HOW[how](case[3]), steps=2), wanted)


def test_blocks_that_write_into_their_input() -> None:
    torch.manual_seed(0)
    blocks, start = [InPlace() for _ in range(3)], torch.randn(2, 4)

    def run() -> list[torch.Tensor]:
        x = start.clone()
        for block in blocks:
            x = block(x)
        return list(torch.autograd.grad(x.square().sum(), [block.linear.weight for block in blocks]))

    wanted = run()
    with checkpointed(blocks, Checkpointing((frozenset(),) * 3, (frozenset({INPUT}),) * 3)) as offloading:
        for one, other in zip(run(), wanted, strict=True):
            assert_near(one, other, 1e-6)
        assert offloading.held


def test_a_training_ends_with_the_same_bits(tmp_path) -> None:
    """D-OPSD with its teacher's forward in between, and previews and probes without gradients."""
    denoiser = TinyDenoiser()
    names = [site.name for site in denoiser.sites()]
    plan = Checkpointing((frozenset(names),) * 2, (frozenset({*names[::2], INPUT}),) * 2)
    for folder, chosen in (("0", Checkpointing()), ("1", plan)):
        train(make_config(steps=3), TinyDenoiser(), make_data(), tmp_path / folder, checkpointing=chosen)
    assert saved_bytes(tmp_path / "0") == saved_bytes(tmp_path / "1")


def test_each_product_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, adapters, forward, predicted = z_image_with_lora(2)
    calls: Counter[str] = Counter()

    def counted(site: Any) -> Any:
        return dataclasses.replace(site, forward=lambda x: calls.update([site.name]) or site.forward(x))

    adapters = AdapterSet([counted(site) for site in denoiser.sites()], adapters.config, device=DEVICE)
    with Repeated() as seen:
        gradients((denoiser, adapters, forward, predicted), Checkpointing.offloaded(predicted))
    assert set(calls.values()) == {1}
    if DEVICE.type == "cpu":  # the pretend device has no fused attention
        assert seen.ops["_scaled_dot_product_flash_attention_for_cpu"] == len(predicted)


def test_a_backward_that_is_repeated_has_the_same_gradients() -> None:
    """The second computes the products again; the inputs come back twice."""
    denoiser, adapters, forward, predicted = z_image_with_lora(1)
    with adapters.attached(), checkpointed(denoiser.blocks(), Checkpointing.offloaded(predicted)):
        loss = forward().square().mean()
        first = torch.autograd.grad(loss, adapters.parameters(), retain_graph=True)
        second = torch.autograd.grad(loss, adapters.parameters())
    assert same(list(first), list(second))


def test_two_graphs_at_once() -> None:
    """As of a preferred and a rejected image, whose losses have one backward."""
    case = z_image_with_lora(1)
    denoiser, adapters, forward, predicted = case
    (wanted, *_), twice = gradients(case, 0), None
    with adapters.attached(), checkpointed(denoiser.blocks(), Checkpointing.offloaded(predicted)):
        adapters.parameters()[0].grad = None
        (forward().square().mean() + forward().square().mean()).backward()
        twice = adapters.parameters()[0].grad
    assert twice is not None
    assert_near(twice, 2 * wanted, 1e-6)


def test_a_product_that_is_overwritten_is_computed_again() -> None:
    torch.manual_seed(0)
    block, x = WritesIntoProducts().requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    (own,) = plain_linear_sites(block)
    calls: list[None] = []
    site = dataclasses.replace(own, forward=lambda x: calls.append(None) or own.forward(x))
    block.linear.forward = lambda x: frozen_linear(x, site)  # type: ignore[method-assign]
    (wanted,) = torch.autograd.grad(block(x).sum(), x)
    names = (frozenset({site.name}),)
    with checkpointed([block], Checkpointing(names, names)):
        (got,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(got, wanted) and len(calls) == 3


def test_an_input_that_is_overwritten_is_an_error() -> None:
    block, x = torch.nn.Tanh(), torch.randn(3, 8, requires_grad=True)
    with checkpointed([block], Checkpointing((frozenset(),), (frozenset({INPUT}),))):
        given = x * 2
        out = block(given)
        given.zero_()
        with pytest.raises(RuntimeError, match="turn activation_offloading off"):
            out.sum().backward()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_in_ram_is_used_again_and_freed(slabs: list[Any]) -> None:
    """As much after five steps as after one; nothing after the run. Most of what autograd kept is no longer there."""
    denoiser, adapters, forward, predicted = z_image_with_lora()
    plan, kept, held = Checkpointing.offloaded(predicted), [], set()
    with adapters.attached(), checkpointed(denoiser.blocks(), plan) as offloading:
        for _ in range(5):
            with LiveBytes() as live:
                out = forward()
            out.square().mean().backward()
            held.add(offloading.held)
            kept.append(live.now)
        assert held == {len(slabs) * SLAB} and plan.ram_bytes(predicted) < offloading.held
    assert not any(slab() is not None for slab in slabs) and not offloading.held


@pytest.mark.parametrize("ending", ["in the forward", "in the middle of the backward", "without a backward"])
def test_after_an_error_nothing_is_held(ending: str, slabs: list[Any]) -> None:
    """Although the graph is still there, as a traceback may keep it."""
    denoiser, adapters, forward, predicted = z_image_with_lora(2)
    kept: list[Any] = []
    there: list[Any] = []

    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        adapters.attached(),
        checkpointed(denoiser.blocks(), Checkpointing.offloaded(predicted)) as offloading,
    ):
        middle = denoiser.blocks()[2]
        if ending == "in the forward":
            middle.register_forward_hook(stop)
        if ending == "in the middle of the backward":
            middle.register_forward_hook(lambda _, __, out: out.register_hook(stop) and None)
        kept.append(forward())
        assert offloading.held
        there = list(offloading._known)
        if ending == "without a backward":
            stop()
        kept[0].mean().backward()
    assert slabs and not any(slab() is not None for slab in slabs)
    assert all(one.host is None and one.arriving is None for one in there)
    assert not offloading.held and not offloading._arriving and not offloading._leaving


def test_a_graph_without_a_backward_gives_its_memory_back() -> None:
    denoiser, adapters, forward, predicted = z_image_with_lora(2)
    with adapters.attached(), checkpointed(denoiser.blocks(), Checkpointing.offloaded(predicted)) as offloading:
        held = []
        for _ in range(4):
            forward()
            offloading.settle()
            gc.collect()
            held.append(offloading.held)
    assert held[0] and held == [held[0]] * 4


@pytest.mark.parametrize("reason", ["RAM is full", "nothing more can be pinned"])
def test_without_ram_it_is_computed_again(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = z_image_with_lora(2)
    wanted = gradients(case, 0)
    if reason == "RAM is full":
        monkeypatch.setattr(host_memory, "available_ram", lambda: 2 * 10**9)
    else:
        monkeypatch.setattr(torch, "empty", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("cannot pin")))
    with caplog.at_level(logging.WARNING, "dopsd"):
        pool = HostPool(is_pinned=False)
        assert pool.take(torch.ones(3)) is None and pool.take(torch.ones(3)) is None
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("activation_offloading: there is no free RAM beyond 0.0 GB")
    monkeypatch.undo()
    monkeypatch.setattr(HostPool, "take", lambda self, like: None)
    assert same(gradients(case, Checkpointing.offloaded(case[3])), wanted)


def test_what_is_in_flight_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, up to one tensor that is larger than the window."""
    denoiser, adapters, forward, predicted = z_image_with_lora()
    plan, window, most = Checkpointing.offloaded(predicted), 2**18, [0, 0]
    largest = max(size for block, names in zip(predicted, plan.in_ram, strict=True) for size in block.sizes(names))
    monkeypatch.setattr(activation_checkpointing, "WINDOW", window)
    monkeypatch.setattr(checkpoint_plan, "WINDOW", window)
    assert plan.in_flight(predicted) == max(window, largest) < plan.ram_bytes(predicted)
    fetch, end = Offloading._fetch, Offloading._end

    def watched(self: Offloading, *args: Any) -> Any:
        out = (fetch if args else end)(self, *args)
        most[0] = max(most[0], sum(left.tensor.nbytes for left in self._leaving))
        coming = [one.arriving[0].nbytes for one in self._arriving.values() if one.arriving is not None]
        most[1] = max(most[1], sum(coming))
        return out

    monkeypatch.setattr(Offloading, "_fetch", watched)
    monkeypatch.setattr(Offloading, "_end", watched)
    gradients((denoiser, adapters, forward, predicted), plan)
    assert 0 < most[0] <= max(window, largest) and window / 2 < most[1] <= max(window, largest)


def test_the_next_ones_are_on_their_way_before_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing, "WINDOW", 2**18)
    late: list[bool] = []
    bring = Offloading.bring
    monkeypatch.setattr(Offloading, "bring", lambda self, one: late.append(one.arriving is None) or bring(self, one))
    case = z_image_with_lora(2)
    gradients(case, Checkpointing.offloaded(case[3]))
    assert len(late) > 20 and not any(late)


def test_the_order_of_a_tensor_in_memory_is_kept() -> None:
    """As kernels of attention return it: [B, L, H, d] seen as [B, H, L, d]."""
    offloading = Offloading(2**20)
    tensor = torch.arange(24.0, device=DEVICE).reshape(1, 3, 2, 4).transpose(1, 2)
    block = offloading.new_block()
    one = block.leave(tensor)
    assert one is not None and one.host is not None and one.host.device.type == "cpu"
    assert one.host.is_pinned() == (DEVICE.type == "cuda")
    back = one.take()
    assert back is not None and torch.equal(back, tensor) and back.stride() == tensor.stride()
    offloading.close()


# -- which ------------------------------------------------------------------------------------------------------------


@given(sizes(), st.integers(0, 900), st.integers(0, 90), st.integers(0, 90), st.integers(0, 300))
def test_with_ram_less_is_computed_again_and_the_peak_fits(
    blocks: list[BlockBytes], budget: int, forward: int, backward: int, ram: int
) -> None:
    """And what is computed again and what is kept are all FLOPs together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_plan, "WINDOW", 20)
        alone = plan_checkpointing(blocks, budget, forward, backward)
        plan = plan_checkpointing(blocks, budget, forward, backward, ram)
        peaks = [peak_bytes(blocks, one, forward, backward) for one in (alone, plan)]
        assert plan.flops(blocks) <= alone.flops(blocks) or peaks[1] < peaks[0]
        assert peaks[1] <= max(budget, peaks[0])
    assert plan.ram_bytes(blocks) <= max(ram, max((block.entry for block in blocks), default=0) + ram)
    for block, (kept, in_ram) in zip(blocks, plan.placed, strict=False):
        assert in_ram <= kept | {INPUT}
        saved = sum(product.flops for product in block.products if product.name in kept)
        assert saved + block.repeated(kept) == pytest.approx(block.repeated(()))
        there = block.saved(kept, in_ram) + sum(block.sizes(in_ram))
        assert there == block.saved(kept)
    if not ram:
        assert plan == alone and not plan.in_ram


def test_ram_takes_what_the_device_cannot_hold() -> None:
    """The products with the most FLOPs per byte stay; those in RAM are spread over the blocks."""
    one = checkpoint_plan.Product
    block = BlockBytes(340, 40, (one("a", 100, 100.0), one("b", 100, 400.0), one("c", 100, 100.0)), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_plan, "WINDOW", 100)
        plan = plan_checkpointing([block] * 4, 900, ram=399)
        assert peak_bytes([block] * 4, plan) <= 900
        assert plan_checkpointing([block] * 4, 800).kept == (frozenset("b"),) * 3
    assert plan.kept == (frozenset("ab"),) * 3 and plan.in_ram == (frozenset("a"),) * 3


def test_inputs_go_to_ram_where_nothing_else_fits() -> None:
    block = BlockBytes(400, 100, (checkpoint_plan.Product("a", 50, 100.0),), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_plan, "WINDOW", 10)
        plan = plan_checkpointing([block] * 4, 700, ram=500)
        assert peak_bytes([block] * 4, plan) <= 700 < peak_bytes([block] * 4, 4)
    assert [INPUT in names for names in plan.in_ram] == [True, True, False, False]


def test_no_more_bytes_than_a_forward_hides() -> None:
    product = checkpoint_plan.Product("a", 10**9, 3e12)
    footprint = Footprint(0, 0, 0, 0, 0, 0, (BlockBytes(10**10, 10**6, (product,)),) * 8)
    plan = footprint.checkpointing(12 * 10**9, 10**12)
    assert plan.ram_bytes(footprint.blocks) == 4 * 10**9  # 24 TFLOP over 6000 FLOP per byte
    assert "4.0 GB of activations in RAM" in footprint.sentence(plan)


def test_it_is_for_cuda_and_half_of_the_free_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    on, cuda = TrainConfig(activation_offloading=True), torch.device("cuda")
    monkeypatch.setattr("dopsd_core.memory.ram_budget.available_ram", lambda: 10**10)
    assert offloading_ram(TrainConfig(), cuda) == offloading_ram(on, torch.device("cpu")) == 0
    assert offloading_ram(on, cuda) == 5 * 10**9 and offloading_ram(on, cuda, 2) == 25 * 10**8
    assert "runs on cpu" in why_not_offloaded(0, torch.device("cpu"))


def test_on_a_cpu_the_command_says_that_it_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    from dopsd_core.standalone.training import _plan

    prepared: Any = SimpleNamespace(config=TrainConfig(activation_offloading=True))
    denoiser: Any = SimpleNamespace(device=torch.device("cpu"))
    assert not _plan(prepared, denoiser, Peers()).checkpointing.count
    assert "activation_offloading has no effect: the model runs on cpu" in capsys.readouterr().out


def test_a_run_is_the_same_with_and_without() -> None:
    """It may be switched when the run is resumed."""
    from dopsd_core.config import changes_that_forbid_resuming

    on, off = TrainConfig(activation_offloading=True), TrainConfig()
    assert on.identity() == off.identity() and not changes_that_forbid_resuming(off, on)
