"""Blocks with gradient checkpointing: the same gradients for fewer bytes, no more blocks than need be."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counters import LiveBytes
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.frozen_linear import frozen_linear
from dopsd_core.denoiser import plain_linear_sites
from dopsd_core.families import Z_IMAGE
from dopsd_core.kept_products import ATTENTION
from dopsd_core.memory.activation_checkpointing import block_bytes, checkpointed
from dopsd_core.memory.checkpoint_plan import BlockBytes, Checkpointing, Product, peak_bytes, plan_checkpointing
from dopsd_core.objectives import DOPSD
from dopsd_core.training.trainer import train

from .devices import DEVICE
from .tiny import TinyDenoiser, make_config, make_data, saved_bytes
from .toy_denoiser import ToyDenoiser, ToyNet, assert_near, lora, make_inputs, randomise


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct storages that autograd saves inside the `with`, those of `known` tensors aside."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def gradients(count: Checkpointing | int, blocks: int = 3) -> list[torch.Tensor]:
    """Of a whole D-OPSD step, whose teacher and rollout run in other modes between the student's forwards."""
    denoiser = ToyDenoiser(ToyNet(num_blocks=blocks))
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    randomise(adapters)
    with adapters.attached(), checkpointed(denoiser.blocks(), count):
        DOPSD(anchor_probability=0).backward(make_inputs(denoiser, adapters))
    return [parameter.grad for parameter in adapters.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_are_the_same(count: int) -> None:
    wanted = gradients(0)
    assert wanted and all(grad.abs().max() > 0 for grad in wanted)
    assert all(torch.equal(one, other) for one, other in zip(gradients(count), wanted, strict=True))


def of_toy(*kept: str) -> Checkpointing:
    """On the toy network's three blocks, each of which keeps those of its products whose names end so."""
    names = [site.name for site in ToyDenoiser(ToyNet(num_blocks=3)).sites()] + [ATTENTION]
    return Checkpointing((frozenset(name for name in names if name.endswith(kept)),) * 3)


@pytest.mark.parametrize("kept", [("",), ("to_q", "w2"), (ATTENTION,)], ids=["everything", "some", "attention"])
def test_gradients_are_the_same_with_kept_products(kept: tuple[str, ...]) -> None:
    wanted, plan = gradients(0), of_toy(*kept)
    assert all(plan.kept)
    assert all(torch.equal(one, other) for one, other in zip(gradients(plan), wanted, strict=True))


def test_a_block_recomputes_once_per_backward_and_never_without_gradients() -> None:
    denoiser = ToyDenoiser(ToyNet(num_blocks=2))
    calls: list[int] = []
    for number, block in enumerate(denoiser.blocks()):
        block.get_submodule("norm").register_forward_hook(lambda *_, number=number: calls.append(number))
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    inputs = make_inputs(denoiser, adapters)
    students = [pair.student for pair in inputs.pairs]
    with adapters.attached(), checkpointed(denoiser.blocks(), 1):
        with torch.no_grad():
            denoiser.predict_x0(inputs.noise, 1.0, students)
        assert calls == [0, 1]
        denoiser.predict_x0(inputs.noise, 1.0, students).mean().backward()
    assert calls == [0, 1, 0, 1, 0]


class InPlace(nn.Module):
    """Writes into its input, as FLUX's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(self.linear(x.clone()))
        return x


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_blocks_that_write_into_their_input(count: int) -> None:
    torch.manual_seed(0)
    blocks = [InPlace() for _ in range(3)]
    start = torch.randn(2, 4)

    def run() -> list[torch.Tensor]:
        x = start.clone()
        for block in blocks:
            x = block(x)
        return list(torch.autograd.grad(x.square().sum(), [block.linear.weight for block in blocks]))

    wanted = run()
    with checkpointed(blocks, count):
        for one, other in zip(run(), wanted, strict=True):
            assert_near(one, other, 1e-6)


@pytest.mark.parametrize("ending", ["success", "error in the block", "error in the backward"])
def test_nothing_is_left_behind(ending: str) -> None:
    net = ToyNet(num_blocks=2)
    blocks = list(net.layers)
    own = blocks[1].forward
    blocks[1].forward = own  # someone's attribute, which has to be there again afterwards
    denoiser = ToyDenoiser(net)
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)

    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    def step() -> None:
        inputs = make_inputs(denoiser, adapters)
        with adapters.attached(), checkpointed(blocks, 2):
            if ending == "error in the block":
                blocks[0].get_submodule("norm").register_forward_hook(stop)
            out = denoiser.predict_x0(inputs.noise, 1.0, [pair.student for pair in inputs.pairs])
            if ending == "error in the backward":
                out.register_hook(stop)
            out.mean().backward()

    if ending == "success":
        step()
    else:
        with pytest.raises(RuntimeError, match="stop"):
            step()
    assert "forward" not in blocks[0].__dict__ and blocks[1].__dict__["forward"] is own
    assert all("forward" not in module.__dict__ for module in net.modules() if module is not blocks[1])


def test_training_ends_with_the_same_bits(tmp_path) -> None:
    for count in (0, 2):
        train(make_config(steps=4), TinyDenoiser(), make_data(), tmp_path / str(count), checkpointing=count)
    assert saved_bytes(tmp_path / "0") == saved_bytes(tmp_path / "2")


# -- which ------------------------------------------------------------------------------------------------------------

PRODUCTS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 50)), max_size=3)


@st.composite
def sizes(draw: st.DrawFn) -> list[BlockBytes]:
    found = []
    for _ in range(draw(st.integers(0, 6))):
        products = tuple(Product(str(number), size, flops) for number, (size, flops) in enumerate(draw(PRODUCTS)))
        found.append(BlockBytes(draw(st.integers(20, 100)), draw(st.integers(0, 10)), products, 1.0))
    return found


@given(sizes(), st.integers(0, 900), st.integers(0, 90), st.integers(0, 90))
def test_what_is_planned_fits_if_anything_does(
    blocks: list[BlockBytes], budget: int, forward: int, backward: int
) -> None:
    """And repeats no more than any number of fully checkpointed blocks that fits."""
    plan = plan_checkpointing(blocks, budget, forward, backward)
    simple = [Checkpointing.full(n) for n in range(len(blocks) + 1)]
    fitting = [one for one in simple if peak_bytes(blocks, one, forward, backward) <= budget]
    if not fitting:
        assert plan == simple[-1]
        return
    assert peak_bytes(blocks, plan, forward, backward) <= budget
    assert plan.flops(blocks) <= min(one.flops(blocks) for one in fitting)


@given(sizes(), st.integers(0, 90), st.integers(0, 90), st.data())
def test_the_peak_is_that_of_a_simulated_step(
    blocks: list[BlockBytes], forward: int, backward: int, data: st.DataObject
) -> None:
    """Walks forward, teacher and backward and keeps books, instead of the closed form."""
    chosen = [frozenset(p.name for p in block.products if data.draw(st.booleans())) for block in blocks]
    for count in range(len(blocks) + 1):
        alive = [
            b.saved(names) if i < count else b.kept for i, (b, names) in enumerate(zip(blocks, chosen, strict=True))
        ]
        highest = sum(alive) + forward
        for i in reversed(range(len(blocks))):
            # what is repeated takes the place of what was kept of it
            repeated = max(blocks[i].kept - (alive[i] - blocks[i].entry), 0) if i < count else 0
            highest = max(highest, sum(alive) + repeated + backward)
            alive[i] = 0
        plan = Checkpointing(tuple(chosen[:count]))
        assert peak_bytes(blocks, plan, forward, backward) == max(highest, backward)


def test_equal_blocks_need_no_room_for_recomputing() -> None:
    """Checkpointing the first half of ten equal blocks costs five kept blocks and five entries, not six."""
    assert peak_bytes([BlockBytes(100, 4)] * 10, 5) == 5 * 100 + 5 * 4
    assert peak_bytes([BlockBytes(100, 4)] * 10, 10) == 100 + 10 * 4


def test_products_that_save_most_per_byte_are_kept_first() -> None:
    """Of all blocks before the next best of any; with room for all activations there is no checkpointing at all."""
    block = BlockBytes(100, 4, (Product("wide", 10, 10.0), Product("deep", 10, 40.0)), 1.0)
    assert plan_checkpointing([block] * 3, 300) == Checkpointing()
    everything = peak_bytes([block] * 3, 3)
    deep, both = frozenset({"deep"}), frozenset({"deep", "wide"})
    assert plan_checkpointing([block] * 3, everything) == Checkpointing((frozenset(), frozenset()))
    assert plan_checkpointing([block] * 3, everything + 25) == Checkpointing((deep, deep))
    assert plan_checkpointing([block] * 3, everything + 35) == Checkpointing((deep, both))
    assert plan_checkpointing([block] * 3, 100) == Checkpointing.full(3), "even that is too much"


diffusers = pytest.importorskip("diffusers")


def test_attention_recomputes_the_way_the_host_had_it() -> None:
    """The host asks for one kind of attention around its forward only."""
    seen: list[bool] = []
    block = nn.Sequential(nn.Linear(2, 2))
    block[0].register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    with checkpointed([block], 1):
        with sdpa_kernel([SDPBackend.MATH]):
            out = block(torch.ones(1, 2))
        out.sum().backward()
    assert seen == [False, False] and torch.backends.cuda.flash_sdp_enabled()


def z_image_with_lora(layers: int = 4) -> tuple[Any, AdapterSet, Callable[[], torch.Tensor], list[BlockBytes]]:
    """diffusers' Z-Image, a LoRA on it, its forward on 256 image and 40 text tokens, and the blocks by formula."""
    from dopsd_core.standalone.hosts.demo import StandaloneDenoiser

    torch.manual_seed(0)
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=layers, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    )  # fmt: skip
    torch.nn.Module.to(net, DEVICE).requires_grad_(False)
    denoiser, config = StandaloneDenoiser(net), Z_IMAGE.lora_config(4)
    adapters = AdapterSet(denoiser.sites(), config, device=DEVICE)
    randomise(adapters)
    x, text = torch.randn(4, 1, 32, 32, device=DEVICE, requires_grad=True), torch.randn(40, 12, device=DEVICE)
    predicted = block_bytes(denoiser.blocks(), denoiser.sites(), Z_IMAGE, config, 256, 40, itemsize=4)

    def forward() -> torch.Tensor:
        return net([x], torch.tensor([0.25], device=DEVICE), [text], return_dict=False)[0][0]

    return denoiser, adapters, forward, predicted


@pytest.mark.parametrize("count", [0, 2, 6])
def test_saved_bytes_are_as_predicted(count: int) -> None:
    """The formula against what autograd saves, on diffusers' Z-Image; its attention is the fused one here."""
    denoiser, adapters, forward, predicted = z_image_with_lora()
    known = [*denoiser.transformer.parameters(), *adapters.parameters()]
    with adapters.attached(), checkpointed(denoiser.blocks(), count), SavedBytes(known) as saved:
        forward()
    kept = sum(block.kept for block in predicted[count:]) + sum(block.entry for block in predicted[:count])
    outside = 0.02 * sum(block.kept for block in predicted)  # embedders and the final layer
    assert kept * 0.95 < saved.total < kept * 1.05 + outside


class Repeated(TorchDispatchMode):
    """Inside the `with`, the bytes that are alive, and the ops of a forward by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def selective_run(how: int | str) -> tuple[list[torch.Tensor], Counter[str], Counter[str], int]:
    """(gradients, calls of each Linear, calls of ops, bytes alive after the forward) of a forward and its backward.

    how: the number of fully checkpointed blocks, or "selective".
    """
    denoiser, adapters, forward, predicted = z_image_with_lora()
    plan = how if isinstance(how, int) else Checkpointing.selective(predicted)
    calls: Counter[str] = Counter()

    def counted(site: Any) -> Any:
        return dataclasses.replace(site, forward=lambda x: calls.update([site.name]) or site.forward(x))

    state = adapters.state()
    adapters = AdapterSet([counted(site) for site in denoiser.sites()], adapters.config, device=DEVICE)
    adapters.load_state("student", state)
    with adapters.attached(), checkpointed(denoiser.blocks(), plan), Repeated() as seen:
        with LiveBytes() as live:
            out = forward()
        kept = live.now
        out.square().mean().backward()
    found = [parameter.grad for parameter in adapters.parameters() if parameter.grad is not None]
    return found, calls, seen.ops, kept


def test_selective_checkpointing_repeats_no_product_and_changes_no_bit() -> None:
    """Z-Image on 256 tokens: the fused attention and each Linear run once; bytes are between those of none and full."""
    none, selective, full = (selective_run(how) for how in (0, "selective", 6))
    for other in (selective, full):
        assert all(torch.equal(one, two) for one, two in zip(none[0], other[0], strict=True))
    assert all(grad.abs().max() > 0 for grad in none[0])
    assert selective[1] == none[1] and sum(full[1].values()) > 1.5 * sum(none[1].values())
    if DEVICE.type == "cpu":  # the pretend device has no fused attention
        attention = "_scaled_dot_product_flash_attention_for_cpu"
        assert none[2][attention] == selective[2][attention] == 6 and full[2][attention] == 12
        assert 0.4 * none[3] < selective[3] < 0.62 * none[3]
    assert full[3] < 0.15 * none[3] and full[3] < selective[3] < none[3]


def test_torchs_attention_is_announced_in_a_training_alone() -> None:
    """Also where the training ends in an error; a function mode in its place would see every attribute of a tensor."""
    torchs = functional.scaled_dot_product_attention
    with pytest.raises(KeyboardInterrupt), checkpointed([nn.Linear(2, 2)], 1):
        assert functional.scaled_dot_product_attention is not torchs
        raise KeyboardInterrupt
    assert functional.scaled_dot_product_attention is torchs


def test_a_backward_that_is_repeated_has_the_same_gradients() -> None:
    """The second finds nothing kept and computes everything."""
    denoiser, adapters, forward, predicted = z_image_with_lora(1)
    with adapters.attached(), checkpointed(denoiser.blocks(), Checkpointing.selective(predicted)):
        loss = forward().square().mean()
        first = torch.autograd.grad(loss, adapters.parameters(), retain_graph=True)
        second = torch.autograd.grad(loss, adapters.parameters())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_saved_bytes_of_selective_checkpointing_are_as_predicted() -> None:
    _, _, _, predicted = z_image_with_lora()
    kept = selective_run("selective")[3]
    plan = Checkpointing.selective(predicted)
    wanted = sum(block.saved(names) for block, names in zip(predicted, plan.kept, strict=True))
    assert kept == pytest.approx(wanted, rel=0.05)


class WritesIntoProducts(nn.Module):
    """Overwrites the output of its Linear, as some networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.linear(x.sin())
        base += 1.0
        return x + base.sin()


def test_a_product_that_is_overwritten_is_computed_again() -> None:
    torch.manual_seed(0)
    block, x = WritesIntoProducts().requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    (own,) = plain_linear_sites(block)
    calls: list[None] = []
    site = dataclasses.replace(own, forward=lambda x: calls.append(None) or own.forward(x))
    block.linear.forward = lambda x: frozen_linear(x, site)  # type: ignore[method-assign]
    (wanted,) = torch.autograd.grad(block(x).sum(), x)
    with checkpointed([block], Checkpointing((frozenset({site.name}),))):
        (got,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(got, wanted) and len(calls) == 3


def test_blocks_before_the_first_adapted_one_save_nothing() -> None:
    """No gradient reaches them; the refiners of a LoRA on the main blocks alone."""
    from dopsd_core.standalone.hosts.demo import StandaloneDenoiser

    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    )  # fmt: skip
    denoiser = StandaloneDenoiser(net)
    config = Z_IMAGE.lora_config(4).replace(targets=("layers.1.attention.to_q",))
    found = block_bytes(denoiser.blocks(), denoiser.sites(), Z_IMAGE, config, 256, 40)
    assert [block.kept > 0 for block in found] == [block.entry > 0 for block in found] == [False, False, False, True]
