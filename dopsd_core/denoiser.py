"""Hooks that a host implements: the denoiser and the Linear layers of its network.

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
    nn, torch = lazy("torch.nn"), lazy("torch")


@dataclass(frozen=True)
class SitePart:
    """One LoRA target: rows `start:stop` of a Linear's output, with diffusers' name of the module.

    A plain Linear has one part with all rows; a fused qkv projection has three.

    Attributes:
        name: diffusers' name.
        start: first output row.
        stop: end of the output rows, exclusive.
    """

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The output rows of this part."""
        return slice(self.start, self.stop)

    @property
    def out_features(self) -> int:
        """Number of output rows."""
        return self.stop - self.start


PartsOf = Callable[[str, int], tuple[SitePart, ...]]
"""(module path, out_features) -> parts; a family's `native_parts` for networks with fused projections."""


@dataclass(frozen=True, eq=False)
class LinearSite:
    """A Linear of the frozen network, and how its host computes with it.

    Attributes:
        name: module path.
        module: the module.
        in_features: size of the input.
        out_features: size of the output.
        parts: LoRA targets in row order, not overlapping.
        forward: the host's forward with bias, [..., in_features] -> [..., out_features]; called without gradients.
        grad_input: product with the weight, g [..., out_features] -> g @ W [..., in_features]; the host provides the
            weight (resident, cast, dequantized or streamed).
        weight: a copy of the weight that `forward` uses, [out_features, in_features], fp32, on the given device, for
            adapters that need its norms; None if `forward` is more than a product with one weight.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    parts: tuple[SitePart, ...]
    forward: Callable[[Tensor], Tensor]
    grad_input: Callable[[Tensor], Tensor]
    weight: Callable[[torch.device], Tensor] | None = None

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
    """The activations of a transformer block.

    Attributes:
        tokens: L, number of tokens of one sample.
        width: D, size of a token between blocks.
        kept: elements per token saved for the block's backward, without LoRA.
        reach: number of tokens that each attends to; all if 0.
        has_streams: whether image and text have Linears of their own.
    """

    tokens: int
    width: int
    kept: int
    reach: int = 0
    has_streams: bool = False


@runtime_checkable
class Denoiser(Protocol):
    """A frozen network that predicts clean latents; implemented by each host."""

    @property
    def device(self) -> torch.device:
        """The device of latents during training."""
        ...

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the network's activations, independent of its weights'; losses are scaled for fp16."""
        ...

    def sites(self) -> Sequence[LinearSite]:
        """EVERY Linear of the network; adapters select targets among their parts and keep the others frozen."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in calling order, each called once per forward; for gradient checkpointing."""
        ...

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x0_hat = x - sigma * v(x, sigma, conditions).

        Builds a graph if grad mode is on. Must not change the adapters' mode.

        Args:
            x: [B, C, h, w] fp32 in model space.
            sigma: in (0, 1], one for the batch.
            conditions: B conditions; their lengths may differ.

        Returns:
            [B, C, h, w] fp32.
        """
        ...


@runtime_checkable
class WholeNetwork(Protocol):
    """A `Denoiser` that holds all weights of its network in plain, resident tensors, so that they can be trained."""

    def network(self) -> nn.Module:
        """The network, whose parameters have diffusers' names and do not require gradients."""
        ...


def whole_site(name: str, out_features: int) -> tuple[SitePart, ...]:
    """The `PartsOf` of a network with diffusers' names: one part with all rows."""
    return (SitePart(name, 0, out_features),)


def plain_linear_sites(root: nn.Module, prefix: str = "", parts_of: PartsOf = whole_site) -> list[LinearSite]:
    """Every `nn.Linear` in `root`, in module order, for hosts with ordinary resident weights.

    prefix: prepended to each module path ("transformer_blocks."). A module with two paths is listed once.
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

    def weight(device: torch.device) -> Tensor:
        return module.weight.detach().to(device, torch.float32, copy=True)

    rows, columns = module.out_features, module.in_features
    return LinearSite(name, module, columns, rows, parts, module.forward, grad_input, weight)
