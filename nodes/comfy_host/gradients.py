"""Changes to a MODEL's network during training, without which gradients would be missing or wrong.

ComfyUI's weights are made for inference: inference tensors, which autograd cannot save; weights in RAM, copied to a
buffer that the next weight overwrites; pages that may be evicted. So none of them may be saved for the backward.
Linears save nothing (`FrozenLinear`); the small modules here compute with clones that exist for one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.cli_args
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...dopsd_core.overrides import overridden
from .linears import cast_parameters, has_own_cast, is_linear, plain

_FEW_TOKENS = 256
_WITH_BACKWARD = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN's attention: its backward is untested here, and ComfyUI may prefer it."""
_FUNCTIONS = ("weight_function", "bias_function")


def thawed_small_parameters(network: nn.Module) -> AbstractContextManager[None]:
    """Inside the `with`, norms and other small modules compute with clones of their parameters where gradients flow.

    So they do where ComfyUI would bring parameters from RAM in a way that waits for the device. A clone exists for one
    forward, so weights may be moved, streamed or evicted in between.
    """
    modules = [m for m in network.modules() if not is_linear(m)]
    return overridden([m for m in modules if next(m.parameters(recurse=False), None) is not None], _thawing)


def norms_on_clones(network: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """Inside the `with`, norms of these names keep a clone of their input for the backward.

    FLUX's blocks overwrite tensors (`img += ...`) that their norms have saved.
    """
    modules = (m for path, m in network.named_modules() if path.rpartition(".")[2] in names)
    return overridden(modules, _on_clone)


@contextmanager
def without_allocation_graphs() -> Iterator[None]:
    """Inside the `with`, a ComfyUI that replays the allocations of a block does not: activations outlive the block."""
    args, name = comfy.cli_args.args, "disable_comfy_compiler"
    before = getattr(args, name, None)  # None in a ComfyUI that does not
    if before is not None:
        setattr(args, name, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(args, name, before)


def plain_attention(
    _: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    """torch's own attention instead of ComfyUI's, with a kernel that has a backward: others have none or a slow one.

    q, k, v [B, heads, L, D], or [B, L, heads * D] without `skip_reshape` -> [B, L, heads * D], or [B, heads, L, D] with
    `skip_output_reshape`. mask: boolean or added, [L, L], [B, L, L] or [B, heads, L, L].
    """
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask.unsqueeze(-3)
    known = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
    # on a CPU with few tokens, the written-out form has a much faster backward
    written_out = q.device.type == "cpu" and q.shape[-2] <= _FEW_TOKENS
    with sdpa_kernel([SDPBackend.MATH] if written_out else _WITH_BACKWARD):
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **known)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


# -- small modules ----------------------------------------------------------------------------------------------------


def _thawing(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def thawed(*args: Any, **kwargs: Any) -> Any:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        needs_clones = _is_unsafe if torch.is_grad_enabled() else _makes_the_host_wait
        if x is None or not x.is_floating_point() or not needs_clones(module, x):
            return forward(*args, **kwargs)
        with _computing_with(module, _clones(module, x)):
            return forward(*args, **kwargs)

    return thawed


def _is_unsafe(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd could not save the parameters of a forward on x, or they could change before the backward."""
    parameters = [value for value in module._parameters.values() if value is not None]
    return has_own_cast(module) or any(
        value.is_inference() or value.device != x.device or type(value) is not nn.Parameter for value in parameters
    )


def _makes_the_host_wait(module: nn.Module, x: Tensor) -> bool:
    """Whether the host would wait for parameters that ComfyUI leaves in RAM and brings each time: padding tokens."""
    if not x.is_cuda or has_own_cast(module) or hasattr(module, "_v"):
        return False
    return any(value is not None and value.device.type == "cpu" for value in module._parameters.values())


@torch.no_grad()
def _clones(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The parameters as ordinary tensors on the device of x, as a forward uses them."""
    if has_own_cast(module) or hasattr(module, "_v"):  # dynamic VRAM applies patches in the cast only
        with cast_parameters(module, x) as (weight, bias):
            cast = {"weight": weight, "bias": bias}
            return {name: value.clone() for name, value in cast.items() if value is not None}
    own = {name: value for name, value in module._parameters.items() if value is not None}
    # copy from RAM without waiting for the device
    return {name: plain(value).to(x.device, copy=True, non_blocking=x.is_cuda) for name, value in own.items()}


@contextmanager
def _computing_with(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with`, the module uses these values instead of its parameters."""
    own, state = module._parameters, module.__dict__
    parameters = {name: own[name] for name in values}
    # what the cast has applied must not be applied again
    functions = {name: state[name] for name in _FUNCTIONS if name in state} if hasattr(module, "_v") else {}
    own.update({name: nn.Parameter(value, requires_grad=False) for name, value in values.items()})
    state.update({name: [] for name in functions})
    try:
        yield
    finally:
        own.update(parameters)
        state.update(functions)


def _on_clone(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: forward(x.clone() if torch.is_grad_enabled() else x)
