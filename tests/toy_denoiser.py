"""Two random networks that satisfy the core's Denoiser protocol.

`ToyDenoiser`, a few thousand weights: attention with split or fused qkv, for adapters, objectives and memory.
`TinyDenoiser`, three Linears: for whole runs, of which a step takes a millisecond.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dopsd_core.adapters import Lora
from dopsd_core.adapters.adapter_set import AdapterSet
from dopsd_core.conditioning.encode import Condition, DualCondition
from dopsd_core.denoiser import LinearSite, plain_linear_sites
from dopsd_core.families import Z_IMAGE
from dopsd_core.objectives import ObjectiveInputs

from .devices import DEVICE

CHANNELS, FEATURES, WIDTH = 4, 6, 16
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
_DRAWING = threading.Lock()  # torch's generator is shared by the threads that stand in for ranks


class ToyAttention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.to_q(x), self.to_k(x), self.to_v(x))
        mixed = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        return self.out(mixed) if self.fused else self.to_out[0](mixed)


class ToyBlock(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = ToyAttention(fused)
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(WIDTH, 24), "w2": nn.Linear(24, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.feed_forward["w2"](F.silu(self.feed_forward["w1"](x)))


class ToyNet(nn.Module):
    """v(x, sigma, features): x [B, C, h, w], features a list of [L, D]."""

    def __init__(self, seed: int = 0, num_blocks: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(CHANNELS, WIDTH)
            self.text = nn.Linear(FEATURES, WIDTH)
            self.time = nn.Linear(1, WIDTH)
            self.layers = nn.ModuleList(ToyBlock(fused=False) for _ in range(num_blocks))
            self.final = nn.Linear(WIDTH, CHANNELS)
        self.requires_grad_(False)

    def forward(self, x: Tensor, sigma: float, features: Sequence[Tensor]) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.embed(x.flatten(2).mT) + self.time(torch.full((1, 1, 1), sigma, device=x.device))
        tokens = tokens + torch.stack([self.text(f.to(x.device)).mean(0) for f in features])[:, None]
        for layer in self.layers:
            tokens = layer(tokens)
        return self.final(tokens).mT.reshape(batch, channels, height, width)


def fuse_qkv(net: ToyNet) -> ToyNet:
    """The same function with q, k, v in one Linear, under the original network's names."""
    fused = ToyNet(num_blocks=0)
    fused.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("layers")})
    for block in net.layers:
        old = block.state_dict()
        weights = {k: v for k, v in old.items() if ".to_" not in k}
        for kind in ("weight", "bias"):
            weights[f"attention.qkv.{kind}"] = torch.cat([old[f"attention.to_{x}.{kind}"] for x in "qkv"])
        weights["attention.out.weight"] = old["attention.to_out.0.weight"]
        new = ToyBlock(fused=True).requires_grad_(False)
        new.load_state_dict(weights)
        fused.layers.append(new)
    return fused


class ToyDenoiser:
    """A host: counts its calls, remembers the grad mode of each."""

    def __init__(self, net: ToyNet | None = None) -> None:
        self.net = (net or ToyNet()).to(DEVICE)
        self.device = DEVICE
        self.compute_dtype = torch.float32
        self.grad_modes: list[bool] = []

    def network(self) -> ToyNet:
        return self.net

    def sites(self) -> list[LinearSite]:
        return plain_linear_sites(self.net, parts_of=Z_IMAGE.native_parts)

    def blocks(self) -> list[nn.Module]:
        return list(self.net.layers)

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        self.grad_modes.append(torch.is_grad_enabled())
        return x - sigma * self.net(x, sigma, [c.features for c in conditions])


class TinyDenoiser(nn.Module):
    """Satisfies `Denoiser` with three Linears over latent pixels; the condition is the mean of its features."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with _DRAWING, torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter = nn.Linear(CHANNELS, WIDTH)
            self.read = nn.Linear(FEATURES, WIDTH)
            self.leave = nn.Linear(WIDTH, CHANNELS)
        self.requires_grad_(False).to(DEVICE)
        self.calls = 0
        self.poison_at: int | None = None  # the forward that returns nan

    @property
    def device(self) -> torch.device:
        return self.enter.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.enter.weight.dtype

    def network(self) -> nn.Module:
        return self

    def sites(self) -> Sequence[LinearSite]:
        return plain_linear_sites(self)

    def blocks(self) -> Sequence[nn.Module]:
        return [self.enter, self.leave]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        read = torch.stack([condition.features.mean(dim=0) for condition in conditions])
        tokens = x.flatten(2).transpose(1, 2)
        hidden = torch.tanh(self.enter(tokens) + self.read(read)[:, None] + sigma)
        velocity = self.leave(hidden).transpose(1, 2).reshape(x.shape)
        self.calls += 1
        if self.calls == self.poison_at:
            velocity = velocity * torch.nan
        return x - sigma * velocity


def lora(rank: int = 3, alpha: float = 6.0, targets: tuple[str, ...] = ("layers.*",)) -> Lora:
    return Lora(rank=rank, alpha=alpha, targets=targets)


def randomise(adapters: AdapterSet, seed: int = 0, std: float = 0.3) -> None:
    """Student and teacher B drawn at random, so that both differ from the base and from each other."""
    generator = torch.Generator().manual_seed(seed)
    for which in ("student", "teacher"):
        state = adapters.state(which)
        drawn = {k: v if "lora_A" in k else torch.randn(v.shape, generator=generator) * std for k, v in state.items()}
        adapters.load_state(which, drawn)


def make_pairs(count: int, seed: int = 0, size: int = 4) -> list[DualCondition]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        DualCondition(
            Condition(draw(3 + i, FEATURES)),
            Condition(draw(5 + i, FEATURES)),
            draw(CHANNELS, size, size),
            f"caption {i}",
            f"key {i}",
        )
        for i in range(count)
    ]


def make_inputs(
    denoiser: ToyDenoiser, adapters: AdapterSet, batch: int = 2, seed: int = 0, **changes
) -> ObjectiveInputs:
    generator = torch.Generator().manual_seed(seed)
    pairs = changes.pop("pairs", None) or make_pairs(batch, seed)
    noise = torch.randn(len(pairs), CHANNELS, 4, 4, generator=generator).to(DEVICE)
    return ObjectiveInputs(denoiser, adapters, pairs, noise, SIGMAS, generator, **changes)


def assert_near(actual: Tensor | None, expected: Tensor | None, rel: float = 1e-5) -> None:
    """Largest difference within `rel` of the largest expected value."""
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= rel * size, f"differ by {error:.3g}, {error / max(size, 1e-30):.3g} of the largest value"


def linear(net: nn.Module, name: str) -> nn.Linear:
    """The Linear at that path."""
    module = net.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
