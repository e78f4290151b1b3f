"""Gradient checkpointing per block.

A checkpointed block saves only its input instead of all activations, and of its forward what it is asked to keep, in
RAM if it is asked to (`activation_offloading.py`); the rest is repeated in the backward. How many blocks, and what they
keep: `checkpoint_plan.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..activation_offloading import InputsInRam, Offloading
from ..adapters import Adapter
from ..denoiser import BlockShape, LinearSite
from ..families import Family
from ..kept_products import ATTENTION, KeptProducts, attention_announced
from ..overrides import Forward, overridden
from .checkpoint_plan import INPUT, WINDOW, BlockBytes, Checkpointing, Product


@contextmanager
def checkpointed(blocks: Sequence[nn.Module], checkpointing: Checkpointing | int) -> Iterator[Offloading]:
    """Inside the `with` block, applies gradient checkpointing to the first blocks when gradients are on.

    The adapters' mode must be the same in forward and backward. The blocks run on clones of their inputs, because some
    networks modify them in place (`img += ...`), and the recomputation needs the original values. Yields the copies in
    RAM, whose memory is freed on exit.

    checkpointing: what each block keeps, or the number of blocks that keep nothing but their input.
    """
    placed = dict(zip(blocks, Checkpointing.of(checkpointing).placed, strict=False))
    offloading = Offloading(WINDOW)
    wrapped = lambda block, forward: _recomputing(forward, *placed[block], offloading)  # noqa: E731
    try:
        with attention_announced(), overridden(placed, wrapped):
            yield offloading
    finally:
        offloading.close()


def _recomputing(forward: Forward, names: Collection[str], in_ram: Collection[str], offloading: Offloading) -> Forward:
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            offloading.settle()
            return forward(*args, **kwargs)
        backends = _attention_backends()

        def on_clones(*args: Any, **kwargs: Any) -> Any:
            with _attention_as(backends):
                return forward(*map(_clone, args), **{name: _clone(value) for name, value in kwargs.items()})

        block = offloading.new_block() if in_ram else None
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if names:
            options["context_fn"] = KeptProducts(names, in_ram, block).contexts
        if block is None or INPUT not in in_ram:
            return checkpoint(on_clones, *args, **options, **kwargs)
        inputs = InputsInRam(block, args, kwargs)
        out = checkpoint(lambda: on_clones(*inputs.args, **inputs.kwargs), **options)
        inputs.leave()
        return out

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


# -- how much they take ----------------------------------------------------------------------------------------------


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

    kept = batch * L * (W + r * P) * itemsize,  entry = batch * L * D * itemsize

    for LoRA (others: `Adapter.part_activations`), with L tokens, W elements per token saved by the block without it
    (`Family.block_shape`), width D of the network, rank r and P adapted parts of the block. A part saves A x. Assumes
    torch's fused attention, which saves no L x L matrix, and fused norms (on a CPU only in fp32). Blocks before the
    first adapted one save nothing: no gradient reaches them.

    The products that a checkpointed block may keep are the outputs of its Linears and of attention, unless the Linears
    are trained themselves.
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
        saved = sum(adapter.part_activations(site.in_features, part.out_features) for part, site in adapted)
        kept = batch * shape.tokens * (shape.kept + saved) * itemsize
        entry = batch * shape.tokens * shape.width * itemsize
        products = block_products(shape, inside, image_tokens, batch, itemsize)
        trained = sum(
            2.0
            * batch
            * tokens_of(site, shape, image_tokens)
            * adapter.part_parameters(site.in_features, part.out_features)
            for part, site in adapted
        )
        if adapter.trains_network:  # then they are no frozen Linears
            trained, products = sum(product.flops for product in products), ()
        out.append(BlockBytes(kept, entry, products, trained))
    return out


def cast_bytes(
    blocks: Sequence[nn.Module], sites: Sequence[LinearSite], adapter: Adapter, itemsize: int = 2
) -> list[int]:
    """Bytes that every block saves besides if the adapter's weights are cast in each forward.

    r * (I + O) * itemsize for LoRA of rank r, where I and O are the sums of inputs and outputs of the adapted parts; 0
    in fp32. The As of a Linear are stacked and cast together; the sums are the same.
    """
    names = adapter.chosen(sites)
    by_module = {site.module: site for site in sites}
    out = []
    for block in blocks:
        inside = [by_module[module] for module in block.modules() if module in by_module]
        sizes = [
            adapter.part_casts(site.in_features, part.out_features)
            for site in inside
            for part in site.parts
            if part.name in names
        ]
        out.append(sum(sizes) * itemsize if itemsize < 4 else 0)
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


def block_products(
    shape: BlockShape, sites: Sequence[LinearSite], image_tokens: int, batch: int = 1, itemsize: int = 2
) -> tuple[Product, ...]:
    """The outputs of a block's frozen Linears and of its attention, with their bytes and FLOPs.

    Fused attention keeps the sums of its softmax besides, in fp32, one per head, of 128 elements.
    """
    found = []
    for site in sites:
        elements = batch * tokens_of(site, shape, image_tokens) * site.out_features
        found.append(Product(site.name, elements * itemsize, 2.0 * elements * site.in_features))
    elements = batch * shape.tokens * shape.width
    size, flops = elements * itemsize + elements // 32, 4.0 * elements * (shape.reach or shape.tokens)
    return (*found, Product(ATTENTION, size, flops))


_OF_TEXT = ("attn.add_", "to_add_out", "ff_context")
_OF_TIME = ("adaLN", "modulation")


def tokens_of(site: LinearSite, shape: BlockShape, image_tokens: int) -> int:
    """The tokens of one sample that a Linear of a block works on, by its name: those of one of two streams, one (the
    time), or all."""
    name = site.parts[0].name
    if any(word in name for word in _OF_TIME):
        return 1
    if any(word in name for word in _OF_TEXT):
        return shape.tokens - image_tokens
    return image_tokens if shape.has_streams else shape.tokens


def _tail(name: str) -> str:
    """A part's name within its block, which a number names: "layers.3.attention.to_q" -> "attention.to_q"."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]
