"""The hash of a file's tensors in its own header, by ModelSpec."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

HASH = "modelspec.hash_sha256"
"""Key of the hash of a file's tensors."""


def has_hash(header: Mapping[str, str]) -> bool:
    """Whether the header of a new file gets the hash of its tensors: ModelSpec's, and that of a run's own files."""
    return "modelspec.sai_model_spec" in header or "dopsd_dataset" in header


def tensor_hash(data: bytes) -> dict[str, str]:
    """ModelSpec's hash of the tensors in the bytes of a safetensors file, without its header, as an entry for that."""
    content = memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    return {HASH: f"0x{hashlib.sha256(content).hexdigest()}"}
