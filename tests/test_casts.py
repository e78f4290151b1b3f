"""Weights in the compute dtype, cast once per optimizer step: the same bits as casting in each forward."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd_core.adapters import Dora, Lokr, Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.adapters.casts import Casts
from dopsd_core.memory.activation_checkpointing import cast_bytes, checkpointed
from dopsd_core.memory.checkpoint_plan import BlockBytes, Product
from dopsd_core.memory.footprint import Footprint
from dopsd_core.objectives import DOPSD
from dopsd_core.optimizers import evaluating
from dopsd_core.teachers import EmaTeacher
from dopsd_core.training.trainer import train

from .devices import DEVICE
from .tiny import TinyDenoiser, make_config, make_data, saved_bytes
from .toy_denoiser import ToyDenoiser, ToyNet, make_inputs

ADAPTERS: dict[str, Lora] = {
    "lora": Lora(rank=3, alpha=6.0, targets=("layers.*",)),
    "dora": Dora(rank=3, alpha=6.0, targets=("layers.*",)),
    "lokr": Lokr(rank=2, alpha=2.0, targets=("layers.*",)),
}


class InDtype(ToyDenoiser):
    """The toy network in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(ToyNet(num_blocks=3).to(dtype))
        self.compute_dtype = dtype

    def predict_x0(self, x: Any, sigma: float, conditions: Any) -> torch.Tensor:
        features = [condition.features.to(self.device, self.compute_dtype) for condition in conditions]
        net: Any = self.net
        tokens = net.embed(x.to(self.compute_dtype).flatten(2).mT)
        tokens = tokens + torch.stack([net.text(f).mean(0) for f in features])[:, None]
        for layer in net.layers:
            tokens = layer(tokens)
        return x - sigma * net.final(tokens).mT.reshape(x.shape).float()


class CastCount(TorchDispatchMode):
    """Counts casts of matrices from fp32 inside the `with`, by op."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._shapes = shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_to_copy" and args[0].dtype == torch.float32 and out.shape in self._shapes:
            self.counts[name] += out.dtype != torch.float32
        if name == "_foreach_copy_":
            self.counts[name] += len(args[0])
        return out


def steps(kind: str, dtype: torch.dtype, keeps: bool, teacher: str = "ema", count: int = 2, blocks: int = 0) -> Any:
    """(the adapters, gradients of each of some steps, the counts of their casts)."""
    denoiser = InDtype(dtype)
    weights = EmaTeacher(decay=0.5) if teacher == "ema" else teacher
    adapters = AdapterSet(denoiser.sites(), ADAPTERS[kind], teacher=weights, device=DEVICE)
    adapters.keep_casts(keeps)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.5)
    gradients, counts = [], []
    shapes = {parameter.shape for parameter in adapters.parameters()}
    with adapters.attached(), checkpointed(denoiser.blocks(), blocks):
        for step in range(count):
            optimizer.zero_grad()
            with CastCount(shapes) as casts:
                DOPSD(anchor_probability=0).backward(make_inputs(denoiser, adapters, seed=step))
                gradients.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
                optimizer.step()
                adapters.update_teacher()
            counts.append(casts.counts)
    return adapters, gradients, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_and_weights_are_those_of_a_cast_in_each_forward(kind: str, dtype: torch.dtype) -> None:
    (kept, wanted, _), (each, found, _) = steps(kind, dtype, keeps=True, blocks=1), steps(kind, dtype, keeps=False)
    assert all(p.dtype == torch.float32 for p in kept.parameters())
    for one, other in zip(wanted, found, strict=True):
        assert len(one) == len(other) == len(kept.parameters())
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, other, strict=True))
    for role in ("student", "teacher"):
        states = kept.state(role), each.state(role)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize(("teacher", "roles"), [("ema", 2), ("frozen", 1), ("same", 1)])
def test_each_weight_is_cast_once_per_step(teacher: str, roles: int) -> None:
    """In the first step by the forward that needs it, then by the update after each step; all blocks recompute."""
    adapters, _, counts = steps("lora", torch.bfloat16, keeps=True, teacher=teacher, count=3, blocks=3)
    weights = roles * len(adapters.parameters())
    assert [c["_to_copy"] for c in counts] == [weights, 0, 0]
    assert [c["_foreach_copy_"] for c in counts] == [weights] * 3
    _, _, counts = steps("lora", torch.bfloat16, keeps=False, teacher=teacher, count=1, blocks=3)
    each = len(adapters.parameters()) * 4 * (2 + (teacher != "frozen"))  # forward, recomputation, teacher; K = 4
    assert counts[0]["_to_copy"] == each


def test_in_fp32_nothing_is_copied() -> None:
    _, _, counts = steps("lora", torch.float32, keeps=True)
    assert not any(sum(c.values()) for c in counts)


def test_gradients_are_added_up_in_place() -> None:
    denoiser = InDtype(torch.bfloat16)
    adapters = AdapterSet(denoiser.sites(), ADAPTERS["lora"], device=DEVICE)
    with adapters.attached():
        DOPSD(anchor_probability=0).backward(make_inputs(denoiser, adapters))
        before = [(p.grad.data_ptr(), p.grad.clone()) for p in adapters.parameters() if p.grad is not None]
        DOPSD(anchor_probability=0).backward(make_inputs(denoiser, adapters))
    for parameter, (place, gradient) in zip(adapters.parameters(), before, strict=True):
        assert parameter.grad is not None and parameter.grad.data_ptr() == place
        assert torch.equal(parameter.grad, 2 * gradient)


def test_a_weight_that_is_used_twice_has_its_gradients_added_up_in_fp32() -> None:
    """1 + 2^-9 is 1 in bf16: a sum of the two gradients in bf16 would lose the second one."""
    weight, casts = torch.nn.Parameter(torch.ones(1)), Casts()
    for use in (casts.of, lambda weight, dtype: weight.to(dtype)):
        weight.grad = None
        x = torch.tensor([1.0, 2**-9], dtype=torch.bfloat16)
        (use(weight, torch.bfloat16) * x[0] + use(weight, torch.bfloat16) * x[1]).backward()
        assert weight.grad is not None and weight.grad.item() == 1 + 2**-9


def test_a_changed_weight_is_cast_again() -> None:
    weight, casts = torch.nn.Parameter(torch.ones(2)), Casts()
    copy = casts.of(weight, torch.bfloat16)
    assert casts.of(weight, torch.bfloat16).data_ptr() == copy.data_ptr()
    with torch.no_grad():
        weight.mul_(3)
    assert casts.of(weight, torch.bfloat16).tolist() == [3, 3]
    with torch.inference_mode():
        weight.data.mul_(1)
        assert casts.of(weight, torch.bfloat16).tolist() == [3, 3]
    loss = casts.of(weight, torch.bfloat16).square().sum()
    with torch.no_grad():
        weight.mul_(2)
        casts.of(weight, torch.bfloat16)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_an_optimizer_changes_unseen_by_torch_are_cast_again() -> None:
    """Schedule-free ones write to `data`, where they switch to the weights for evaluation and back."""

    class Switching(torch.optim.SGD):
        def eval(self) -> None:
            weight.data.mul_(3)

        def train(self) -> None:
            weight.data.div_(3)

    weight, casts = torch.nn.Parameter(torch.ones(2)), Casts()
    assert casts.of(weight, torch.bfloat16).tolist() == [1, 1]
    with evaluating(Switching([weight], lr=0.1)):
        assert casts.of(weight, torch.bfloat16).tolist() == [3, 3]
    assert casts.of(weight, torch.bfloat16).tolist() == [1, 1]


def test_copies_that_were_made_in_inference_mode_can_be_trained_with() -> None:
    denoiser = InDtype(torch.bfloat16)
    adapters = AdapterSet(denoiser.sites(), ADAPTERS["lora"], device=DEVICE)
    inputs = make_inputs(denoiser, adapters)
    with adapters.attached():
        with torch.inference_mode():
            denoiser.predict_x0(inputs.noise, 1.0, [pair.student for pair in inputs.pairs])
        DOPSD(anchor_probability=0).backward(inputs)
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_bytes_of_casts_in_each_forward() -> None:
    """Of a toy block at rank 3: to_q, to_k, to_v, to_out of 16 by 16, and w1 and w2 of 16 by 24."""
    denoiser = ToyDenoiser()
    sites, blocks = denoiser.sites(), denoiser.blocks()
    assert cast_bytes(blocks, sites, ADAPTERS["lora"], 2) == [2 * 3 * (4 * 32 + 2 * 40)] * 2
    assert cast_bytes(blocks, sites, ADAPTERS["lora"], 4) == [0, 0]
    assert ADAPTERS["lora"].cast_bytes(2, True) == 4 and ADAPTERS["lora"].cast_bytes(4, True) == 0


def footprint(**changes: Any) -> Footprint:
    """Four blocks of 100 bytes, of which one product of 40 is worth 8 FLOPs."""
    block = BlockBytes(100, 10, (Product("p", 40, 8.0),), 1.0)
    return replace(Footprint(50, 4, 16, 0, 0, 0, (block,) * 4, casts=52, block_casts=(5, 6, 7, 8)), **changes)


def test_casts_are_kept_where_that_costs_no_recomputation() -> None:
    whole = footprint()
    assert whole.total(0) == 50 + 4 + 16 + 52 + 400 and whole.keeps_casts
    assert whole.within(522) == whole and whole.checkpointing(522).count == 0
    each = whole.within(150)
    assert not each.keeps_casts and each.block_casts == () and [b.kept for b in each.blocks] == [105, 106, 107, 108]
    assert each.total(4) == whole.total(4) - 52 + 8, "the block in the backward has casts of its own"
    assert not whole.within(0).keeps_casts, "where nothing fits"
    for budget in range(100, 540, 3):
        chosen, other = whole.within(budget), footprint(casts=0, block_casts=(), blocks=each.blocks)
        repeated = [one.checkpointing(budget).flops(whole.blocks) for one in (chosen, other)]
        assert repeated[0] <= repeated[1] + 0.01 * 4 * 9
        assert chosen.total(chosen.checkpointing(budget)) <= max(budget, other.total(other.checkpointing(budget)))


def test_a_run_in_bf16_is_the_same_either_way(tmp_path: Any) -> None:
    for keeps in (True, False):
        denoiser = TinyDenoiser().to(torch.bfloat16)
        host: Any = InBf16(denoiser)
        train(make_config(steps=4), host, make_data(), tmp_path / str(keeps), keeps_casts=keeps)
    assert saved_bytes(tmp_path / "True") == saved_bytes(tmp_path / "False")


class InBf16:
    """The tiny network, which computes in bf16."""

    def __init__(self, denoiser: TinyDenoiser) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def predict_x0(self, x: Any, sigma: float, conditions: Any) -> torch.Tensor:
        cast = [type(c)(c.features.to(x.device).bfloat16()) for c in conditions]
        return self._denoiser.predict_x0(x.bfloat16(), sigma, cast).float()
