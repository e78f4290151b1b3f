"""The layout of a family's original single file, which ComfyUI loads, beside diffusers' names of the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class SingleFile:
    """How diffusers' weights are written under their original names.

    Attributes:
        names: (pattern, replacement) pairs for `re.sub`, all applied to every name in order; no other name changes.
        fused: (names of modules in row order, name of the module that has the rows of all); parts of names.
        values: (pattern, change) pairs for weights, of any shape, that are stored in another form; patterns are of new
            names.
    """

    names: Sequence[tuple[str, str]] = ()
    fused: Sequence[tuple[tuple[str, ...], str]] = ()
    values: Sequence[tuple[str, Callable[[Tensor], Tensor]]] = ()

    def from_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, of any shape, under their original names; those of fused modules are joined along their rows."""
        out: dict[str, Tensor] = {}
        for name, value in self._joined(state).items():
            for pattern, replacement in self.names:
                name = re.sub(pattern, replacement, name)
            for pattern, change in self.values:
                value = change(value) if re.search(pattern, name) else value
            out[name] = value
        return out

    def _joined(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = dict(state)
        for parts, whole in self.fused:
            for name in [name for name in out if f".{parts[0]}." in name]:
                rows = [out.pop(name.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
                out[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(rows)
        return out


def swapped_halves(value: Tensor) -> Tensor:
    """[2 n, ...] with its halves in the other order: (scale, shift) of diffusers is (shift, scale) in older code."""
    first, second = value.chunk(2)
    return torch.cat([second, first])


def flattened(value: Tensor) -> Tensor:
    """[...] -> [n]."""
    return value.reshape(-1)
