"""What the Denoisers over diffusers' transformers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

from ...denoiser import LinearSite, plain_linear_sites

Transformer = TypeVar("Transformer", bound=ModelMixin)


class DiffusersDenoiser(Generic[Transformer]):
    """A frozen transformer, run in the dtype of its weights."""

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.transformer.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the transformer."""
        return self.transformer.dtype

    def sites(self) -> Sequence[LinearSite]:
        """Every Linear of the transformer."""
        return plain_linear_sites(self.transformer)
