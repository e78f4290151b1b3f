"""LoRAs that ComfyUI computes beside a Linear instead of merging them into its weight (Load LoRA (Bypass)).

They replace `forward`: out = g(f(x) + h(x)) with the Linear f and the adapter's h and g, all of them affine. So the
gradient of x does not depend on x, and it can be computed by running h and g alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from comfy.weight_adapter.bypass import BypassForwardHook
from torch import Tensor, nn

from ...dopsd_core.adapters.frozen_linear import frozen_linear
from ...dopsd_core.denoiser import LinearSite

Hook = Any
"""A BypassForwardHook."""


def bypass_hooks(module: nn.Module) -> list[Hook]:
    """The bypass hooks on the module's forward, outermost first; none if anything else wraps it too."""
    hooks: list[Hook] = []
    forward: Any = module.__dict__.get("forward")
    hook: Any = getattr(forward, "__self__", None)
    while isinstance(hook, BypassForwardHook) and hook not in hooks:
        hooks.append(hook)
        forward = hook.original_forward
        hook = getattr(forward, "__self__", None)
    is_own = getattr(forward, "__func__", None) is type(module).forward
    return hooks if is_own else []


def through_hooks(site: LinearSite, hooks: Sequence[Hook]) -> LinearSite:
    """The site of the Linear with its hooks, made from that of the Linear alone; x [..., in], gradient [..., out]."""

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], site.out_features)

    alone = replace(site, forward=nothing)

    def forward(x: Tensor) -> Tensor:
        with _over(hooks[-1], site.forward):
            return hooks[0]._bypass_forward(x)

    def grad_input(grad: Tensor) -> Tensor:
        x = grad.new_zeros(*grad.shape[:-1], site.in_features, requires_grad=True)
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(_over(hooks[-1], lambda value: frozen_linear(value, alone)))
            for hook in hooks:
                stack.enter_context(_thawed(hook.adapter))
            return torch.autograd.grad(hooks[0]._bypass_forward(x), x, grad)[0]

    return replace(site, forward=forward, grad_input=grad_input, weight=None)


@contextmanager
def kept_injected(patcher: Any) -> Iterator[None]:
    """Inside the `with`, ComfyUI keeps the patcher's hooks in place.

    Otherwise it removes and re-adds its hooks whenever it loads a model, which would remove the adapters that training
    has added on top of them.
    """
    injections, is_injected = patcher.injections, patcher.is_injected
    patcher.injections, patcher.is_injected = {}, False
    try:
        yield
    finally:
        patcher.injections, patcher.is_injected = injections, is_injected


@contextmanager
def _over(hook: Hook, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before, hook.original_forward = hook.original_forward, forward
    try:
        yield
    finally:
        hook.original_forward = before


@contextmanager
def _thawed(adapter: Any) -> Iterator[None]:
    """Inside the `with`, the adapter's tensors can be saved by autograd."""
    before = getattr(adapter, "weights", None)
    if not isinstance(before, (tuple, list)):
        yield
        return
    adapter.weights = [v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in before]
    try:
        yield
    finally:
        adapter.weights = before
