"""Gradient checkpointing per block.

A checkpointed block saves only its input instead of all activations, and its forward is repeated in the backward. Only
as many blocks as needed are checkpointed, and always the FIRST ones: the backward reaches them last, when the
activations of the others are freed, so the recomputed activations need no additional memory.
"""

from __future__ import annotations

import re
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
    """Activation memory of a block in bytes.

    Attributes:
        kept: saved for its backward.
        entry: saved if it is checkpointed.
    """

    kept: int
    entry: int


def checkpointed(blocks: Sequence[nn.Module], count: int) -> AbstractContextManager[None]:
    """Inside the `with` block, applies gradient checkpointing to the first `count` blocks when gradients are on.

    The adapters' mode must be the same in forward and backward. The blocks run on clones of their inputs, because some
    networks modify them in place (`img += ...`), and the recomputation needs the original values.
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
    """The enabled attention backends; a host may restrict them around its forward."""
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
    """Peak activation memory of the blocks with gradient checkpointing on the first `count`.

    The peak is either between forward and backward, during the teacher's forward: the inputs of the first `count`
    blocks and all activations of the others. Or during the recomputation and backward of block i < `count`: the inputs
    up to its own, and its activations. forward, backward: transient workspace per block in bytes.
    """
    entries = list(accumulate((block.entry for block in blocks[:count]), initial=0))
    between = entries[-1] + sum(block.kept for block in blocks[count:]) + max(forward, backward)
    return max([between, *(entries[i + 1] + blocks[i].kept + backward for i in range(count))])


def blocks_to_checkpoint(blocks: Sequence[BlockBytes], budget: int, forward: int = 0, backward: int = 0) -> int:
    """The smallest number of checkpointed blocks with `peak_bytes` within the budget; all if even that is too much."""
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
    """Activation memory of every block, computed from the widths of its Linears.

    kept = batch * L * (W + r * P) * itemsize + r * (I + O) * c,  entry = batch * L * D * itemsize

    for LoRA (others: `Adapter.part_activations`), with L tokens, W elements per token saved by the block without it
    (`Family.block_shape`), width D of the network, rank r, P adapted parts of the block, and I, O the sums of their
    inputs and outputs. A part saves A x. c is the
    itemsize of a compute dtype narrower than fp32, to which the LoRA is cast in each forward, else 0. Assumes torch's
    fused attention, which saves no L x L matrix, and fused norms (on a CPU only in fp32). Blocks before the first
    adapted one save nothing: no gradient reaches them.
    """
    names = adapter.chosen(sites)
    out: list[BlockBytes] = []
    has_gradient = False
    for shape, inside in block_shapes(blocks, sites, family, image_tokens, text_tokens):
        adapted = [(part, site) for site in inside for part in site.parts if part.name in names]
        has_gradient = has_gradient or bool(adapted)
        if not has_gradient:
            out.append(BlockBytes(0, 0))
            continue
        # the As of a Linear are stacked and cast together; the sums are the same
        parameters = sum(adapter.part_casts(site.in_features, part.out_features) for part, site in adapted)
        saved = sum(adapter.part_activations(site.in_features, part.out_features) for part, site in adapted)
        kept = batch * shape.tokens * (shape.kept + saved) * itemsize
        cast = parameters * itemsize if itemsize < 4 else 0
        out.append(BlockBytes(kept + cast, batch * shape.tokens * shape.width * itemsize))
    return out


def block_shapes(
    blocks: Sequence[nn.Module], sites: Sequence[LinearSite], family: Family, image_tokens: int, text_tokens: int
) -> list[tuple[BlockShape, list[LinearSite]]]:
    """(activations, Linears) of each block."""
    by_module = {site.module: site for site in sites}
    out = []
    for block in blocks:
        inside = [by_module[module] for module in block.modules() if module in by_module]
        inputs = {_tail(part.name): site.in_features for site in inside for part in site.parts}
        out.append((family.block_shape(inside[0].name, inputs, image_tokens, text_tokens), inside))
    return out


def _tail(name: str) -> str:
    """A part's name within its block, which a number names: "layers.3.attention.to_q" -> "attention.to_q"."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]
