"""torch.compile of the transformer blocks, for what is between their Linears.

The Linears and other modules whose forward is overridden run as they are: their hosts bring, cast or dequantise weights
in ways that cannot be compiled. What is compiled are the norms, RoPE, activations, gates and residuals around them.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .overrides import overridden

_COMPILERS = ("c++", "g++", "clang++", "cl")


def obstacle(device: torch.device) -> str:
    """Why blocks cannot be compiled for this device, in one sentence; "" if they can."""
    what = (
        "--compile needs {} to compile the blocks for this device, which is not installed: install it, or leave it out"
    )
    if device.type == "cpu":
        return "" if any(map(shutil.which, _COMPILERS)) else what.format("a C++ compiler")
    if device.type != "cuda":
        return f"--compile is for CUDA and CPU, and the model runs on {device.type}: leave it out"
    return "" if importlib.util.find_spec("triton") is not None else what.format("the package triton")


@contextmanager
def compiled(blocks: Sequence[nn.Module], is_on: bool = True, backend: str = "inductor") -> Iterator[None]:
    """Inside the `with` block, the blocks are compiled, if `is_on`; on exit they are as before.

    To be entered when adapters are attached, and before gradient checkpointing, which goes around it. Image sizes and
    text lengths may change: sizes are compiled as variables.
    """
    if not is_on:
        yield
        return
    opaque = [module for block in blocks for module in block.modules() if "forward" in module.__dict__]
    with (
        overridden([m for m in opaque if m not in set(blocks)], lambda _, forward: torch.compiler.disable(forward)),
        overridden(blocks, lambda _, forward: torch.compile(forward, backend=backend, dynamic=True)),
    ):
        yield
