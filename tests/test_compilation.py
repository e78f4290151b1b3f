"""Compiled blocks: the same gradients within rounding, with and without gradient checkpointing, and nothing left."""

from __future__ import annotations

import shutil

import pytest
import torch

from dopsd_core import compilation
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.compilation import compiled, obstacle
from dopsd_core.kept_products import ATTENTION
from dopsd_core.memory.activation_checkpointing import checkpointed
from dopsd_core.memory.checkpoint_plan import Checkpointing
from dopsd_core.objectives import DOPSD

from .devices import DEVICE
from .toy_denoiser import ToyDenoiser, ToyNet, assert_near, lora, make_inputs, randomise

CPU = torch.device("cpu")


def gradients(backend: str, count: int, is_on: bool = True) -> list[torch.Tensor]:
    """Of a whole D-OPSD step; count: of the fully checkpointed blocks, or -1 for selective checkpointing, and
    -2 for it in RAM."""
    torch.compiler.reset()
    denoiser = ToyDenoiser(ToyNet(num_blocks=2))
    adapters = AdapterSet(denoiser.sites(), lora(), device=DEVICE)
    randomise(adapters)
    names = [*(site.name for site in denoiser.sites()), ATTENTION]
    kept = Checkpointing.keeping(2, names).kept
    plan = Checkpointing(kept, kept if count == -2 else ()) if count < 0 else count
    blocks = denoiser.blocks()
    with adapters.attached(), compiled(blocks, is_on, backend), checkpointed(blocks, plan):
        DOPSD(anchor_probability=0).backward(make_inputs(denoiser, adapters))
    assert all("forward" not in module.__dict__ for block in blocks for module in block.modules())
    return [parameter.grad for parameter in adapters.parameters() if parameter.grad is not None]


@pytest.mark.skipif(bool(obstacle(DEVICE)), reason="there is no compiler")
@pytest.mark.parametrize(
    ("backend", "count"),
    [
        ("eager", 0),
        pytest.param("inductor", -1, marks=pytest.mark.long),
        pytest.param("eager", -2, marks=pytest.mark.long),
    ],
    ids=["only traced", "selective", "offloaded"],
)
def test_gradients_are_the_same_within_rounding(backend: str, count: int) -> None:
    wanted, got = gradients(backend, count, is_on=False), gradients(backend, count)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert_near(one, other, 1e-4)


def test_without_a_compiler_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle(torch.device("mps")) == "--compile is for CUDA and CPU, and the model runs on mps: leave it out"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    for device, what in ((CPU, "a C++ compiler"), (torch.device("cuda"), "the package triton")):
        assert obstacle(device).startswith(f"--compile needs {what} to compile the blocks")
