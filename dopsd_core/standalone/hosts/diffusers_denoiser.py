"""What the Denoisers over diffusers' transformers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...conditioning.encode import Condition
from ...denoiser import LinearSite, plain_linear_sites

Transformer = TypeVar("Transformer", bound=ModelMixin)


class DiffusersDenoiser(Generic[Transformer]):
    """A frozen transformer, run in the dtype of its weights; those of its Linears may be quantised."""

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer.eval().requires_grad_(False)
        self._dtype = transformer.dtype  # kept: sharded weights are fp32 and gathered in it

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.transformer.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype that the transformer computes in."""
        return self._dtype

    def network(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    def sites(self) -> Sequence[LinearSite]:
        """Every Linear of the transformer."""
        return [_with_own_backward(site) for site in plain_linear_sites(self.transformer)]


def equal_shapes(conditions: Sequence[Condition]) -> list[list[int]]:
    """The indices of conditions of equal shapes, which can go through a network together."""
    groups: dict[object, list[int]] = {}
    for row, condition in enumerate(conditions):
        shape = (condition.features.shape, tuple(latent.shape for latent in condition.reference_latents))
        groups.setdefault(shape, []).append(row)
    return list(groups.values())


def _with_own_backward(site: LinearSite) -> LinearSite:
    """The site with the backward of its module's class, if its weight is no plain matrix in the layout of a Linear."""
    module = site.module
    assert isinstance(module, nn.Linear)
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor:
        return site

    def grad_input(grad: Tensor) -> Tensor:
        # the layer is affine: its derivative at zero is its derivative everywhere
        with torch.enable_grad():
            x = torch.zeros(*grad.shape[:-1], site.in_features, dtype=grad.dtype, device=grad.device)
            x.requires_grad_(True)
            return torch.autograd.grad(site.forward(x), x, grad)[0]

    return replace(site, grad_input=grad_input, weight=None)  # its tensor is packed
