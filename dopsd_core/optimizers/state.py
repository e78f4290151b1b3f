"""An optimizer's whole state as tensors and JSON, and the check that an optimizer resumes from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import is_sharded
from .base import set_rate, start_training


class UnsavableState(TypeError):
    """An optimizer's state contains what cannot be saved, or not under its name."""


_COMPARED = 24
"""Steps that are compared: some optimizers use a part of their state only every tenth step."""


def flatten_state(state: Mapping[Any, Any]) -> tuple[dict[str, Tensor], str]:
    """Splits an optimizer's `state_dict()` into tensors of any shape by path ("state/3/exp_avg") and JSON of the rest.

    Types of containers and keys and their order are preserved. Tensors that share memory, such as the tables of 8-bit
    optimizers, become copies; those in parts stay where they are.

    Raises:
        UnsavableState: the state contains something other than tensors, containers and plain values.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_flatten(state, "", tensors))


def unflatten_state(tensors: Mapping[str, Tensor], rest: str) -> dict[Any, Any]:
    """The inverse of `flatten_state`, with tensors in the same shapes."""
    return _unflatten(json.loads(rest), tensors)


def resumed_state(fresh: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """`saved`, a `state_dict()` with tensors of any shape, with the group options of `fresh` that it lacks."""
    groups = [{**new, **old} for new, old in zip(fresh["param_groups"], saved["param_groups"], strict=True)]
    return {**saved, "param_groups": groups}


def resumes_exactly(build: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer], device: torch.device) -> bool:
    """Whether an optimizer that is loaded from its saved state makes the same next steps, on two matrices.

    Raises:
        UnsavableState: its state contains something that cannot be saved.
        Exception: whatever `build` or the optimizer's `step` raises.
    """
    whole = _matrices(device)
    optimizer = _started(build, whole)
    for number in range(2):
        _step(optimizer, whole, number)
    tensors, rest = flatten_state(optimizer.state_dict())
    cut = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
    resumed = _started(build, cut)
    resumed.load_state_dict(resumed_state(resumed.state_dict(), unflatten_state(tensors, rest)))
    for number in range(2, 2 + _COMPARED):
        _step(optimizer, whole, number)
        _step(resumed, cut, number)
    return all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def _matrices(device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, 96, generator=generator).to(device)  # 8-bit optimizers leave small ones in 32 bits
    return [nn.Parameter(drawn), nn.Parameter(torch.zeros(3, 4, device=device))]


def _started(
    build: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    optimizer = build(parameters)
    start_training(optimizer)
    return optimizer


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number + 1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    set_rate(optimizer, float(optimizer.param_groups[0]["lr"]))  # as a training does before each step
    optimizer.step()


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (Tensor, nn.Parameter) or (isinstance(value, Tensor) and is_sharded(value)):
        while path in tensors:  # keys that differ only in their kind, such as 0 and "0"
            path += "~"
        value = value.detach()
        tensors[path] = value if is_sharded(value) else value.cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _flatten(inner, _below(path, key), tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(inner, _below(path, i), tensors) for i, inner in enumerate(value)]}
    raise UnsavableState(f"the optimizer's state contains a {type(value).__name__} at {path}, which cannot be saved")


def _below(path: str, key: Any) -> str:
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise UnsavableState(f"the optimizer's state has the key {key!r} at {path or 'its top'}; use a str or an int")
    name = str(key).replace("~", "~0").replace("/", "~1")
    return f"{path}/{name}" if path else name


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "mapping":
        return {key: _unflatten(item, tensors) for key, item in inner}
    items = [_unflatten(item, tensors) for item in inner]
    return tuple(items) if kind == "tuple" else items
