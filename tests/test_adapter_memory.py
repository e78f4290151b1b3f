"""A forward without gradients: the same bits as with them, and no copies of the Linears' outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.counters import LiveBytes
from dopsd_core.adapters import Dora, Lokr, Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.denoiser import SitePart, plain_linear_sites

from .devices import DEVICE
from .test_activation_offloading import klein_with_lora
from .toy_denoiser import ToyDenoiser, ToyNet, fuse_qkv, make_pairs, randomise

KINDS = {"lora": Lora, "dora": Dora, "lokr": Lokr}
TOKENS, WIDTH, OUT = 512, 64, 768


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("targets", [("layers.*",), ("to_q", "to_v", "w1")], ids=["all", "some"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_differs_from_a_forward_with_gradients(
    kind: str, is_fused: bool, targets: tuple[str, ...], strength: float
) -> None:
    denoiser = ToyDenoiser(fuse_qkv(ToyNet()) if is_fused else ToyNet())
    adapters = AdapterSet(denoiser.sites(), KINDS[kind](rank=3, targets=targets), device=DEVICE)
    randomise(adapters)
    adapters.strength = strength
    x, conditions = torch.randn(2, 4, 4, 4, device=DEVICE), [pair.student for pair in make_pairs(2)]
    base = denoiser.predict_x0(x, 0.75, conditions)
    with adapters.attached():
        wanted = denoiser.predict_x0(x, 0.75, conditions).detach()
        with torch.no_grad():
            got = [denoiser.predict_x0(x, 0.75, conditions) for _ in range(2)]
        with torch.inference_mode():
            got.append(denoiser.predict_x0(x, 0.75, conditions))
    assert not torch.equal(wanted, base)
    assert all(torch.equal(one, wanted) for one in got)


@pytest.mark.parametrize(
    ("kind", "parts", "most"),
    # in outputs; a part of three is a third: LoRA makes one at a time, LoKr two, DoRA four
    [("lora", 1, 1.1), ("lora", 3, 1.5), ("lokr", 3, 1.8), ("dora", 3, 2.6)],
)
def test_the_output_is_in_memory_once(kind: str, parts: int, most: float) -> None:
    linear = torch.nn.Linear(WIDTH, OUT, device=DEVICE).requires_grad_(False)
    (own,) = plain_linear_sites(torch.nn.Sequential(linear))
    rows = OUT // parts
    named = tuple(SitePart(f"part{n}", n * rows, (n + 1) * rows) for n in range(parts))
    adapters = AdapterSet([replace(own, parts=named)], KINDS[kind](rank=2, targets=("part*",)), device=DEVICE)
    x = torch.randn(TOKENS, WIDTH, device=DEVICE)
    with adapters.attached(), torch.no_grad():
        linear(x)  # the casts are there
        with LiveBytes() as live:
            out = linear(x)
    assert out.nbytes <= live.peak < most * out.nbytes


def test_a_teachers_forward_takes_as_much_as_without_lora() -> None:
    """On FLUX.2-klein of four blocks, but for A x: its widest Linear is adapted as a whole."""
    _, adapters, forward, _ = klein_with_lora()
    peaks = {}
    with adapters.attached(), torch.no_grad():
        for mode in ("off", "teacher"):
            with adapters.use(mode), LiveBytes() as live:
                forward()
            peaks[mode] = live.peak
    assert peaks["teacher"] < 1.03 * peaks["off"]


@pytest.mark.parametrize("linears", [1, 2])
def test_gradients_of_what_is_concatenated_are_freed_one_by_one(linears: int) -> None:
    """As attention and MLP in FLUX's single-stream blocks: the smaller one does not keep the memory of both."""
    torch.manual_seed(0)
    small, large = (torch.randn(8, width, device=DEVICE, requires_grad=True) for width in (2, 6))
    net = torch.nn.ModuleList(torch.nn.Linear(8, 4, device=DEVICE) for _ in range(linears)).requires_grad_(False)

    def gradients() -> tuple[list[torch.Tensor], list[int]]:
        held: list[int] = []
        parts = [small * 2, large * 2]
        for part in parts:
            part.register_hook(lambda grad: held.append(grad.untyped_storage().nbytes()))
        x = torch.cat(parts, -1)
        loss = sum((linear(x).square().sum() for linear in net), torch.zeros((), device=DEVICE))
        return list(torch.autograd.grad(loss, [small, large])), sorted(held)

    wanted, _ = gradients()
    with AdapterSet(plain_linear_sites(net), Lora(targets=("0",)), device=DEVICE).attached():
        got, held = gradients()
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert held == [small.nbytes, small.nbytes + large.nbytes]
