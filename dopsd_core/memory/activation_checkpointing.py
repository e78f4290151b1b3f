"""Gradient checkpointing per block: how many blocks of a network recompute in the backward, and how they do it.

A block that recomputes keeps its entry instead of everything that its backward needs, and costs another forward. Only
as many do as memory asks for, and always the FIRST ones: the backward comes to them last, when what the others kept is
gone, so that the recomputed block needs no room of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..adapters import Adapter
from ..denoiser import BlockShape, LinearSite
from ..families import Family
from ..overrides import Forward, overridden


@dataclass(frozen=True)
class BlockBytes:
    """Activation memory of a block, in bytes.

    Attributes:
        kept: for its backward.
        entry: if it recomputes.
    """

    kept: int
    entry: int


def checkpointed(blocks: Sequence[nn.Module], count: int) -> AbstractContextManager[None]:
    """Inside the `with`, the first `count` blocks recompute in the backward; without gradients they run as ever.

    The adapters' mode must be the forward's when the backward runs. Blocks work on clones of their tensors, because
    some networks write into a block's inputs (`img += ...`), which the recomputation needs as they were.
    """
    return overridden(blocks[: max(count, 0)], _recomputing)


def _recomputing(block: nn.Module, forward: Forward) -> Forward:
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        backends = _attention_backends()

        def on_clones(*args: Any, **kwargs: Any) -> Any:
            with _attention_as(backends):
                return forward(*map(_clone, args), **{name: _clone(value) for name, value in kwargs.items()})

        return checkpoint(on_clones, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention_backends() -> list[SDPBackend]:
    """Those that torch's attention may use here; a host may have chosen them around its forward."""
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [backend for backend, is_enabled in enabled.items() if is_enabled]


def _attention_as(backends: list[SDPBackend]) -> AbstractContextManager[Any]:
    return nullcontext() if backends == _attention_backends() else sdpa_kernel(backends)


# -- how many ---------------------------------------------------------------------------------------------------------


def peak_bytes(blocks: Sequence[BlockBytes], count: int, forward: int = 0, backward: int = 0) -> int:
    """The most that the blocks take at a time when the first `count` recompute.

    Either between forward and backward, while the teacher looks at the same state: the entries of the first `count` and
    all of the others. Or while block i < `count` is recomputed and run back: the entries up to its own, and all of it.
    forward, backward: bytes that live for a moment inside a block's forward and backward.
    """
    entries = list(accumulate((block.entry for block in blocks[:count]), initial=0))
    between = entries[-1] + sum(block.kept for block in blocks[count:]) + max(forward, backward)
    return max([between, *(entries[i + 1] + blocks[i].kept + backward for i in range(count))])


def blocks_to_checkpoint(blocks: Sequence[BlockBytes], budget: int, forward: int = 0, backward: int = 0) -> int:
    """The fewest leading blocks to recompute for `peak_bytes` to be within the budget; all where none will do."""
    counts = range(len(blocks) + 1)
    return next((n for n in counts if peak_bytes(blocks, n, forward, backward) <= budget), len(blocks))


def block_bytes(
    blocks: Sequence[nn.Module],
    sites: Sequence[LinearSite],
    family: Family,
    adapter: Adapter,
    image_tokens: int,
    text_tokens: int,
    batch: int = 1,
    itemsize: int = 2,
) -> list[BlockBytes]:
    """Activation memory of every block, from the widths of its Linears alone.

    kept = batch * L * (W + r * P) * itemsize + r * (I + O) * c,  entry = batch * L * D * itemsize

    with L tokens and W elements per token kept by the block without LoRA (`Family.block_shape`), D the network's
    width, r the rank, P the adapted parts of the block and I, O the sums of their inputs and outputs. A part keeps A x.
    c is the itemsize of a compute dtype narrower than fp32, for which the LoRA is cast in each forward, else 0.
    Attention is torch's fused one, which keeps no L x L matrix, and norms are fused (on a CPU only in fp32).
    """
    names = adapter.chosen(sites)
    out = []
    for shape, inside in block_shapes(blocks, sites, family, image_tokens, text_tokens):
        adapted = [(part, site) for site in inside for part in site.parts if part.name in names]
        # the As of one Linear are stacked and cast as one; the sums are the same
        parameters = sum(adapter.part_parameters(site.in_features, part.out_features) for part, site in adapted)
        kept = batch * shape.tokens * (shape.kept + adapter.part_activations() * len(adapted)) * itemsize
        cast = parameters * itemsize if itemsize < 4 else 0
        out.append(BlockBytes(kept + cast, batch * shape.tokens * shape.width * itemsize))
    return out


def block_shapes(
    blocks: Sequence[nn.Module], sites: Sequence[LinearSite], family: Family, image_tokens: int, text_tokens: int
) -> list[tuple[BlockShape, list[LinearSite]]]:
    """What each block works on, and its Linears."""
    by_module = {site.module: site for site in sites}
    out = []
    for block in blocks:
        inside = [by_module[module] for module in block.modules() if module in by_module]
        inputs = {_tail(part.name): site.in_features for site in inside for part in site.parts}
        out.append((family.block_shape(inside[0].name, inputs, image_tokens, text_tokens), inside))
    return out


def _tail(name: str) -> str:
    """A part's name inside its block: "layers.3.attention.to_q" -> "attention.to_q"."""
    head, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    return tail if index.isdigit() else name
