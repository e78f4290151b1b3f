"""Checkpointing and its memory formula through ComfyUI's own networks, whose weights are inference tensors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import krea2_twins
import pytest
import torch
import toy
from inprocess import ComfyUI

SIGMA = 0.7
MODELS = {
    "z_image": (toy.z_image, (2, 16, 16, 16), 64),
    "flux2": (toy.flux2, (2, 128, 12, 12), 192),
    "krea2": (krea2_twins.model, (2, 16, 16, 16), krea2_twins.TEXT_LAYERS * krea2_twins.TEXT_WIDTH),
}


class Case:
    """A small model of a family with a LoRA on it, two samples of 64 (144) image tokens and 40 text tokens."""

    def __init__(self, comfyui: ComfyUI, family: str) -> None:
        self.comfyui, self.host = comfyui, comfyui.module("nodes.comfy_host.denoiser")
        self.core = comfyui.core("memory.activation_checkpointing")
        build, self.shape, width = MODELS[family]
        with torch.inference_mode():
            self.model = build()
        self.denoiser = self.host.ComfyDenoiser(self.model)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(self.shape, generator=generator)
        condition = comfyui.core("conditioning.encode").Condition
        self.conditions = [condition(torch.randn(40, width, generator=generator)) for _ in range(2)]
        self.calls: Counter[str] = Counter()
        self.called_in_forward: Counter[str] = Counter()

    def counted(self, site: Any) -> Any:
        """The site, whose forwards are counted."""
        return dataclasses.replace(site, forward=lambda x: self.calls.update([site.name]) or site.forward(x))

    def adapters(self) -> Any:
        config = self.denoiser.family.lora_config(4, 8.0)
        sites = [self.counted(site) for site in self.denoiser.sites()]
        adapters = self.comfyui.core("adapters.adapter_set").AdapterSet(sites, config, teacher="frozen")
        state, generator = adapters.state(), torch.Generator().manual_seed(2)
        for key, value in state.items():
            if ".lora_B." in key:
                value.normal_(0, 0.02, generator=generator)
        adapters.load_state("student", state)
        return adapters

    def selective(self) -> Any:
        """Every block keeps all of its products."""
        plan = self.comfyui.core("memory.checkpoint_plan").Checkpointing
        return plan.selective(self.predicted())

    def predicted(self) -> list[Any]:
        """The memory of the blocks by formula."""
        denoiser, family = self.denoiser, self.denoiser.family
        image, config = family.image_tokens(*self.shape[2:]), family.lora_config(4, 8.0)
        return self.core.block_bytes(
            denoiser.blocks(), denoiser.sites(), family, config, image, 40, batch=2, itemsize=4
        )

    def gradients(self, count: Any, saved: Any = None) -> list[torch.Tensor]:
        """Called as a node is: inside inference mode."""
        with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
            adapters = self.adapters()
            with (
                self.denoiser.trainable(self.shape),
                adapters.attached(),
                self.core.checkpointed(self.denoiser.blocks(), count),
            ):
                saved = saved or SavedBytes()
                with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                    out = self.denoiser.predict_x0(self.x, SIGMA, self.conditions)
                self.called_in_forward = Counter(self.calls)
                out.square().mean().backward()
        return [parameter.grad for parameter in adapters.parameters()]


class SavedBytes:
    """Bytes of the distinct storages that autograd saves, parameters aside."""

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf:
            self._storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


@pytest.fixture(params=sorted(MODELS))
def case(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Case:
    return Case(comfyui, request.param)


@pytest.fixture
def fused_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs on a GPU; for few tokens the host writes attention out on a CPU."""
    monkeypatch.setattr(case.comfyui.module("nodes.comfy_host.gradients"), "_FEW_TOKENS", 0)
    yield


def test_every_block_is_listed_once(case: Case) -> None:
    blocks = case.denoiser.blocks()
    inside = {module for block in blocks for module in block.modules()}
    targets = {part for part in case.adapters().part_names()}
    assert len(set(blocks)) == len(blocks)
    for site in case.denoiser.sites():
        if any(part.name in targets for part in site.parts):
            assert site.module in inside, site.name


def test_gradients_are_the_same(case: Case) -> None:
    wanted = case.gradients(0)
    assert all(grad.abs().max() > 0 for grad in wanted)
    for count in range(1, len(case.denoiser.blocks()) + 1):
        for one, other in zip(case.gradients(count), wanted, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()


def test_selective_checkpointing_repeats_no_product(case: Case, fused_attention: None) -> None:
    """Gradients to the bit and each Linear called once, with FLUX's in-place blocks and inference tensors."""
    wanted = case.gradients(0)
    case.calls.clear()
    got = case.gradients(case.selective())
    assert case.calls == case.called_in_forward and max(case.calls.values()) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    case.calls.clear()
    case.gradients(len(case.denoiser.blocks()))
    assert sum(case.calls.values()) > sum(case.called_in_forward.values()), "fully checkpointed, they are called again"


def test_klein_gradients_are_those_of_a_copying_network(comfyui: ComfyUI) -> None:
    """FLUX's blocks write into their inputs; the gradients are the slopes of the loss all the same."""
    case = Case(comfyui, "flux2")
    wanted, adapters = case.gradients(0), case.adapters()
    direction = [grad / torch.cat([g.flatten() for g in wanted]).norm() for grad in wanted]
    norm = float(torch.cat([grad.flatten() for grad in wanted]).norm())

    def loss(step: float) -> float:
        with torch.no_grad():
            for parameter, slope in zip(adapters.parameters(), direction, strict=True):
                parameter.add_(slope, alpha=step)
            value = case.denoiser.predict_x0(case.x, SIGMA, case.conditions).double().square().mean()
            for parameter, slope in zip(adapters.parameters(), direction, strict=True):
                parameter.sub_(slope, alpha=step)
        return float(value)

    with torch.inference_mode(False), case.denoiser.trainable(case.shape), adapters.attached():
        measured = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert measured == pytest.approx(norm, rel=2e-2)


@pytest.mark.parametrize("case", ["flux2", "z_image"], indirect=True)  # Krea 2's formula is for 16 bits
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_saved_bytes_are_as_predicted(case: Case, fused_attention: None, share: float) -> None:
    blocks = case.denoiser.blocks()
    count = round(share * len(blocks))
    predicted = case.predicted()
    saved = SavedBytes()
    case.gradients(count, saved)
    total = sum(block.kept for block in predicted)
    wanted = sum(block.entry for block in predicted[:count]) + sum(block.kept for block in predicted[count:])
    assert abs(saved.total - wanted) < 0.05 * total


@pytest.mark.parametrize("ending", ["success", "error"])
def test_nothing_is_left_behind(case: Case, ending: str) -> None:
    network = case.model.model.diffusion_model

    def train_a_little() -> None:
        with torch.inference_mode(False), torch.enable_grad(), case.denoiser.trainable(case.shape):
            adapters = case.adapters()
            with adapters.attached(), case.core.checkpointed(case.denoiser.blocks(), 2):
                out = case.denoiser.predict_x0(case.x, SIGMA, case.conditions)
                if ending == "error":
                    out.register_hook(fail)
                out.mean().backward()

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("stop")

    before = [parameter for parameter in network.parameters()]
    if ending == "error":
        with pytest.raises(torch.OutOfMemoryError):
            train_a_little()
    else:
        train_a_little()
    assert all("forward" not in module.__dict__ for module in network.modules())
    assert all(one is other for one, other in zip(network.parameters(), before, strict=True))


def test_offloading_changes_no_bit_and_repeats_no_product(case: Case, fused_attention: None) -> None:
    """Products and inputs in RAM, with FLUX's in-place blocks, called with keywords, and inference tensors."""
    plan = case.comfyui.core("memory.checkpoint_plan").Checkpointing.offloaded(case.predicted())
    wanted = case.gradients(0)
    case.calls.clear()
    got = case.gradients(plan)
    assert case.calls == case.called_in_forward and max(case.calls.values()) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_what_is_in_ram_is_not_saved_on_the_device(case: Case, fused_attention: None) -> None:
    """Of what autograd saves with full checkpointing, the inputs of blocks are gone; that of the last norm stays."""
    full, offloaded = SavedBytes(), SavedBytes()
    case.gradients(len(case.denoiser.blocks()), full)
    case.gradients(case.comfyui.core("memory.checkpoint_plan").Checkpointing.offloaded(case.predicted()), offloaded)
    last = case.predicted()[-1].entry
    assert offloaded.total < 1.1 * last < 0.6 * full.total
