"""The Linears of a MODEL's network as the core's LinearSites: ComfyUI's, plain or quantised, and those of other packs.

A Linear's own forward is used, and for the backward its weight comes from its own cast. Layers of other packs, such as
ComfyUI-GGUF's, may have their own cast. A layer without one, or whose forward is not x @ W.T + b, is an error that
names it (`require_known_layers`, `require_adjoints`), because its gradient would be wrong.

Legend: x [..., in_features], g [..., out_features], W [out_features, in_features].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...dopsd_core.denoiser import LinearSite
from ...dopsd_core.families import Family
from .bypass import bypass_hooks, through_hooks

_KNOWN_PACKAGES = ("torch", "comfy")
_TOLERANCE = 0.08
"""Of the adjoint test. Activations in 8 or 4 bits are off by a few percent, a wrong weight by about 100 %."""
_FACTOR, _NONLINEAR = -8.0, 0.015
"""Of the linearity test: the scale of a second input, by which activations in few bits scale too, and the tolerance
beside rounding."""


class UnknownLayer(ValueError):
    """D-OPSD cannot backpropagate through a layer of the network; the message names it."""

    def __init__(self, name: str, module: nn.Module, reason: str) -> None:
        super().__init__(
            f"{name} of this MODEL is a {_qualified(type(module))}, which D-OPSD cannot train through: {reason}. "
            "Load the model with Load Diffusion Model or with ComfyUI-GGUF's loader, without nodes that replace its "
            "layers"
        )


def linear_sites(network: nn.Module, family: Family) -> list[LinearSite]:
    """Every Linear (plain, cast or quantised), with its LoRA parts under diffusers' names."""
    return [_site(_path(name), module, family) for name, module in network.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear; ComfyUI's quantised one is not an nn.Linear."""
    return isinstance(module, nn.Linear) or (hasattr(module, "weight_function") and hasattr(module, "in_features"))


def has_own_cast(module: nn.Module) -> bool:
    """Whether its class has its own cast from stored weights to those of a forward, as ComfyUI-GGUF's layers do."""
    return callable(getattr(type(module), "cast_bias_weight", None))


def plain(value: Any) -> Any:
    """A tensor without another pack's subclass, whose operations may differ (GGUF's `clone` returns itself)."""
    if type(value) is Tensor or not isinstance(value, Tensor) or isinstance(value, QuantizedTensor):
        return value
    return value.as_subclass(Tensor)


@contextmanager
def cast_parameters(module: Any, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias [out] in the dtype and on the device of x [..., in], valid inside the `with`.

    Quantised weights are dequantised.
    """
    if has_own_cast(module):
        weight, bias = (plain(value) for value in module.cast_bias_weight(x)[:2])
        yield weight, bias
    elif not hasattr(module, "weight_function"):
        yield module.weight.detach().to(x), None if module.bias is None else module.bias.detach().to(x)
    else:
        weight, bias, stream = comfy.ops.cast_bias_weight(module, input=x, offloadable=True)
        try:
            yield weight.dequantize().to(x.dtype) if isinstance(weight, QuantizedTensor) else weight, bias
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _path(name: str) -> str:
    """A module's path without the part that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def _site(name: str, module: Any, family: Family) -> LinearSite:
    hooks = bypass_hooks(module)
    own: Callable[[Tensor], Tensor] = type(module).forward.__get__(module) if hooks else module.forward
    clamps = isinstance(module, comfy.ops.fp8_ops.Linear)  # its input, and in place

    def forward(x: Tensor) -> Tensor:
        return plain(own(x.clone() if clamps else x))

    def grad_input(grad: Tensor) -> Tensor:
        """g [..., out_features] -> g @ W [..., in_features], with the weight of a forward."""
        flat = grad.reshape(-1, grad.shape[-1])
        with cast_parameters(module, flat) as (weight, _):
            return (flat @ weight).reshape(*grad.shape[:-1], -1)

    def weight(device: torch.device) -> Tensor:
        with torch.no_grad(), cast_parameters(module, torch.zeros(1, columns, device=device)) as (cast, _):
            return cast.to(torch.float32, copy=True)

    rows, columns = module.out_features, module.in_features
    site = LinearSite(name, module, columns, rows, family.native_parts(name, rows), forward, grad_input, weight)
    return through_hooks(site, hooks) if hooks else site


# -- what is refused --------------------------------------------------------------------------------------------------


def require_known_layers(network: nn.Module, block_lists: Mapping[str, Sequence[nn.Module]]) -> None:
    """Checks every layer without running it.

    Args:
        block_lists: the network's lists of transformer blocks by path.

    Raises:
        UnknownLayer: a Linear's cast weight is not [out_features, in_features], a Linear is wrapped, or a layer with
            matrices is neither torch's nor ComfyUI's.
    """
    for name, blocks in block_lists.items():
        _require_alike(name, blocks)
    checked: set[object] = set()
    for path, module in network.named_modules():
        name = _path(path)
        if not is_linear(module):
            _require_known_class(name, module)
        elif not _is_known(module):
            weight: Any = getattr(module, "weight", None)
            kind = (type(module), type(weight), getattr(weight, "dtype", None), getattr(weight, "tensor_type", None))
            fits = getattr(weight, "shape", None) == (module.out_features, module.in_features)
            if (kind, fits) not in checked:
                checked.add((kind, fits))
                _require_weight(name, module)


def require_adjoints(sites: Sequence[LinearSite], device: torch.device, dtype: torch.dtype) -> None:
    """Checks with one token that the backward fits the forward, in every layer that is not torch's or ComfyUI's own.

    With y(x) = W x, <g @ W, x> = <y, y> must hold for g = y(x), and y(-8 x) = -8 y(x).

    Raises:
        UnknownLayer: one of them does not hold for a layer.
    """
    with torch.inference_mode(False), torch.no_grad():  # as in training
        for site in sites:
            if not _is_known(site.module):
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(1, 1, site.in_features, generator=generator).to(device, dtype)
                bias, out, other = (site.forward(x * scale).float() for scale in (0.0, 1.0, _FACTOR))
                y = out - bias
                wanted, got = y.square().sum(), (site.grad_input(y.to(dtype)).float() * x.float()).sum()
                is_adjoint = (wanted - got).abs() <= _TOLERANCE * wanted
                if not (is_adjoint and _is_linear(bias, out, other, torch.finfo(dtype).eps)):
                    raise UnknownLayer(site.name, site.module, "its forward is not x @ W.T + b")


def _is_linear(bias: Tensor, out: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether y(-8 x) = -8 y(x), for a layer's outputs [..., out_features] at 0, x and -8 x."""
    wanted = _FACTOR * (out - bias)
    rounded = rounding / 2 * (other.norm() + abs(_FACTOR) * (out.norm() + bias.norm()))
    return bool((other - bias - wanted).norm() <= _NONLINEAR * wanted.norm() + rounded)


def _require_alike(name: str, blocks: Sequence[nn.Module]) -> None:
    """The blocks of a list have their Linears at the same places; any other module at such a place is a wrapper."""
    places = [{_path(path) for path, module in block.named_modules() if is_linear(module)} for block in blocks]
    anywhere = set[str]().union(*places)
    for number, (block, found) in enumerate(zip(blocks, places, strict=True)):
        for path in sorted(anywhere - found):
            wrapped = next((other for other in sorted(found) if other.startswith(f"{path}.")), None)
            if wrapped is not None:
                wrapper = block.get_submodule(path)
                raise UnknownLayer(f"{name}.{number}.{path}", wrapper, f"it wraps the Linear {wrapped}")


def _is_known(module: nn.Module) -> bool:
    """Whether forward and weight of a Linear are torch's or ComfyUI's own."""
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, QuantizedTensor) or type(weight) in (Tensor, nn.Parameter)
    return plain and _is_from_known_package(module) and "forward" not in module.__dict__


def _is_from_known_package(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _KNOWN_PACKAGES


def _require_known_class(name: str, module: nn.Module) -> None:
    matrices = [
        value for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if value.ndim > 1
    ]
    is_leaf = next(module.children(), None) is None
    if is_leaf and matrices and not has_own_cast(module) and not _is_from_known_package(module):
        raise UnknownLayer(name, module, "it is not a Linear, and what it computes is not known")


def _require_weight(name: str, module: Any) -> None:
    wanted = (module.out_features, module.in_features)
    try:
        x = torch.zeros(1, module.in_features, device=module.weight.device)
        with torch.inference_mode(), cast_parameters(module, x) as (weight, _):
            got = tuple(weight.shape)
    except Exception as error:  # the cast was not written for this layer
        raise UnknownLayer(name, module, f"its weight cannot be read ({error})") from error
    if got != wanted:
        raise UnknownLayer(name, module, f"its weight is {list(got)} where {list(wanted)} is expected")


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
