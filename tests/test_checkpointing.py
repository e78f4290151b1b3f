"""Blocks with gradient checkpointing: the same gradients for fewer bytes, no more blocks than need be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.families import Z_IMAGE
from dopsd_core.memory.activation_checkpointing import (
    BlockBytes,
    block_bytes,
    blocks_to_checkpoint,
    checkpointed,
    peak_bytes,
)
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


def gradients(count: int, blocks: int = 3) -> list[torch.Tensor]:
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
        train(make_config(steps=4), TinyDenoiser(), make_data(), tmp_path / str(count), checkpoint_blocks=count)
    assert saved_bytes(tmp_path / "0") == saved_bytes(tmp_path / "2")


# -- how many ---------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.builds(BlockBytes, st.integers(20, 100), st.integers(0, 10)), max_size=8)


@given(SIZES, st.integers(0, 900), st.integers(0, 90), st.integers(0, 90))
def test_the_fewest_blocks_that_fit(blocks: list[BlockBytes], budget: int, forward: int, backward: int) -> None:
    count = blocks_to_checkpoint(blocks, budget, forward, backward)
    peaks = [peak_bytes(blocks, n, forward, backward) for n in range(len(blocks) + 1)]
    assert peaks[count] <= budget or count == len(blocks)
    assert all(peak > budget for peak in peaks[:count])


@given(SIZES, st.integers(0, 90), st.integers(0, 90))
def test_the_peak_is_that_of_a_simulated_step(blocks: list[BlockBytes], forward: int, backward: int) -> None:
    """Walks forward, teacher and backward and keeps books, instead of the closed form."""
    for count in range(len(blocks) + 1):
        alive = [block.entry if i < count else block.kept for i, block in enumerate(blocks)]
        highest = sum(alive) + forward
        for i in reversed(range(len(blocks))):
            recomputed = blocks[i].kept if i < count else 0
            highest = max(highest, sum(alive) + recomputed + backward)
            alive[i] = 0
        assert peak_bytes(blocks, count, forward, backward) == max(highest, backward)


def test_equal_blocks_need_no_room_for_recomputing() -> None:
    """Checkpointing the first half of ten equal blocks costs five kept blocks and five entries, not six."""
    assert peak_bytes([BlockBytes(100, 4)] * 10, 5) == 5 * 100 + 5 * 4
    assert peak_bytes([BlockBytes(100, 4)] * 10, 10) == 100 + 10 * 4


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


@pytest.mark.parametrize("count", [0, 2, 6])
def test_saved_bytes_are_as_predicted(count: int) -> None:
    """The formula against what autograd saves, on diffusers' Z-Image; its attention is the fused one here."""
    from dopsd_core.standalone.hosts.demo import StandaloneDenoiser

    torch.manual_seed(0)
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=4, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    )  # fmt: skip
    torch.nn.Module.to(net, DEVICE)
    denoiser = StandaloneDenoiser(net)
    config = Z_IMAGE.lora_config(4)
    adapters = AdapterSet(denoiser.sites(), config, device=DEVICE)
    x, text = torch.randn(4, 1, 32, 32, device=DEVICE, requires_grad=True), torch.randn(40, 12, device=DEVICE)
    predicted = block_bytes(denoiser.blocks(), denoiser.sites(), Z_IMAGE, config, 256, 40, itemsize=4)
    known = [*net.parameters(), *adapters.parameters()]
    with adapters.attached(), checkpointed(denoiser.blocks(), count), SavedBytes(known) as saved:
        net([x], torch.tensor([0.25], device=DEVICE), [text], return_dict=False)
    kept = sum(block.kept for block in predicted[count:]) + sum(block.entry for block in predicted[:count])
    outside = 0.02 * sum(block.kept for block in predicted)  # embedders and the final layer
    assert kept * 0.95 < saved.total < kept * 1.05 + outside


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
