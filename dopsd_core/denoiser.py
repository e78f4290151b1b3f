"""What the core asks of a host: a denoiser, and the Linear layers of its network.

Legend: B batch, C latent channels, h w latent height and width, L tokens, D features. `sigma` as in `sigmas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .conditioning.encode import Condition
else:
    nn = lazy("torch.nn")


@dataclass(frozen=True)
class SitePart:
    """One LoRA target: rows `start:stop` of a Linear's output, under the name that diffusers gives the module.

    A plain Linear is one part with all its rows; a fused qkv projection is three.
    """

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The output rows that belong to this part."""
        return slice(self.start, self.stop)

    @property
    def out_features(self) -> int:
        """Number of output rows."""
        return self.stop - self.start


PartsOf = Callable[[str, int], tuple[SitePart, ...]]
"""(module path, out_features) -> parts; a family's `native_parts` for networks whose projections are fused."""


@dataclass(frozen=True, eq=False)
class LinearSite:
    """A Linear of the frozen network, and how its host computes with it.

    `forward` is the host's own forward, [..., in_features] -> [..., out_features], bias included; it is called without
    gradients. `grad_input` is the product with the weight alone, g [..., out_features] -> g @ W [..., in_features]:
    how the weight is had for it (resident, cast, dequantised, streamed) is the host's affair. Parts are in row order,
    do not overlap.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    parts: tuple[SitePart, ...]
    forward: Callable[[Tensor], Tensor]
    grad_input: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        end = 0
        for part in self.parts:
            if not end <= part.start < part.stop <= self.out_features:
                raise ValueError(
                    f"site {self.name!r}: part {part.name!r} has rows {part.start}:{part.stop}, but parts must be in "
                    f"row order without overlap within 0:{self.out_features} (previous part ends at {end})"
                )
            end = part.stop


@dataclass(frozen=True)
class BlockShape:
    """What a transformer block works on. tokens: L of one sample. width: D, of a token between blocks. kept: elements
    per token that the block's backward needs, LoRA aside."""

    tokens: int
    width: int
    kept: int


@runtime_checkable
class Denoiser(Protocol):
    """A frozen network that predicts clean latents. The standalone host and ComfyUI's host both satisfy it."""

    @property
    def device(self) -> torch.device:
        """Where latents live during training."""
        ...

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network's activations are in, whatever its weights are stored in; in fp16 losses are scaled."""
        ...

    def sites(self) -> Sequence[LinearSite]:
        """EVERY Linear of the network; adapters choose targets among their parts and keep the others frozen."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, each called once in a forward, in the order of the calls; for checkpointing."""
        ...

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x0_hat = x - sigma * v(x, sigma, conditions).

        x: [B, C, h, w] fp32, model space. sigma: in (0, 1], one for the batch. conditions: B of them; lengths may
        differ. Returns [B, C, h, w] fp32. Builds a graph whenever grad mode is on, and must not change the adapters'
        mode.
        """
        ...


def whole_site(name: str, out_features: int) -> tuple[SitePart, ...]:
    """The `PartsOf` of a network that already uses diffusers' names: one part with all rows."""
    return (SitePart(name, 0, out_features),)


def plain_linear_sites(root: nn.Module, prefix: str = "", parts_of: PartsOf = whole_site) -> list[LinearSite]:
    """Every `nn.Linear` below `root`, in module order, for hosts whose weights are ordinary resident tensors.

    `prefix` is put before each module path ("transformer_blocks."). A module used under two paths is listed once.
    """
    sites = []
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear):
            name = prefix + path
            sites.append(_plain_site(name, module, parts_of(name, module.out_features)))
    return sites


def _plain_site(name: str, module: nn.Linear, parts: tuple[SitePart, ...]) -> LinearSite:
    def grad_input(grad: Tensor) -> Tensor:
        return grad @ module.weight.detach().to(grad.dtype)

    return LinearSite(name, module, module.in_features, module.out_features, parts, module.forward, grad_input)
