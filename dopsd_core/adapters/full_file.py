"""The file of a whole model: one safetensors file in the layout of the family's original files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as format_safetensors
from torch import Tensor

from ..files.atomic import write_atomic
from ..files.disk import writing
from ..text import printable

if TYPE_CHECKING:
    from ..families import Family

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def save_model(
    path: Path, state: Mapping[str, Tensor], family: Family, metadata: Mapping[str, str], dtype: str = "bf16"
) -> None:
    """Writes all weights of a network, atomically.

    A family without a single-file layout is written under diffusers' names, as in a folder of diffusers.

    Args:
        path: the file.
        state: the weights under diffusers' names, of any shape.
        family: the model's.
        metadata: facts for the header.
        dtype: name in `DTYPES`.

    Raises:
        DiskError: the folder cannot be written; an older file is untouched.
    """
    named = dict(state) if family.single_file is None else family.single_file.from_diffusers(state)
    header = {"format": "pt", **{key: printable(value) for key, value in metadata.items()}}
    stored = {name: value.to(DTYPES[dtype]).contiguous() for name, value in named.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, format_safetensors(stored, header))
