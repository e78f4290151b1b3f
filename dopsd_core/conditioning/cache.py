"""A disk cache of encoded conditions: one safetensors file per part, keyed by everything that determines it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from ..files.atomic import write_atomic

log = logging.getLogger("dopsd")

FORMAT = "dopsd-conditions-3"
"""Part of every key, so that entries of another format are never read. They may be deleted.

Incremented when the meaning of an encoder's identity or the preprocessing of images changes: in format 2, different
text encoders shared identities, and colour profiles were ignored.
"""


def digest_bytes(data: bytes) -> str:
    """SHA-256 of an image file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def cache_key(kind: str, image_digest: str, caption: str, identity: str, settings: Mapping[str, Any]) -> str:
    """A key of 64 hex digits that changes whenever an input does; fields are delimited, so they cannot run together.

    Raises:
        TypeError: settings are not JSON-serializable.
    """
    fields = [FORMAT, kind, image_digest, caption, identity, dict(settings)]
    return digest_bytes(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode())


class ConditionCache:
    """Encoded tensors in `folder`, one safetensors file per key, each with its key and a checksum of its contents.

    Several processes may share a folder: files are written atomically.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of the entry for `key`."""
        return self.folder / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors by name on the CPU, in the shapes stored; None if missing or damaged (with a warning)."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cached condition %s cannot be read (%s); computing it again", path, error)
            return None
        try:
            with torch.inference_mode(False):  # ordinary tensors, even if the caller is in inference mode
                return _parse_entry(data, key)
        except Exception as error:  # a damaged file can fail in any way inside the parser
            log.warning("cached condition %s is damaged or stale (%s); computing it again", path, error)
            return None

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the entry (tensors of any shape, by name) atomically and replaces an older one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "key": key, "sha256": _checksum(key, whole)}
        write_atomic(self.path(key), format_safetensors(whole, metadata))

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stores the entry and returns it as ordinary tensors on the CPU, in the same shapes.

        If the folder is not writable, it logs a warning and continues without the cache.
        """
        plain = {name: plain_cpu(tensor) for name, tensor in tensors.items()}
        try:
            self.store(key, plain)
        except OSError as error:
            log.warning("cached condition %s cannot be written (%s); continuing without", self.path(key), error)
        return plain


def plain_cpu(tensor: Tensor) -> Tensor:
    """A copy as an ordinary, contiguous CPU tensor of the same shape, from any mode and device."""
    # Encoders may run in inference mode, whose tensors autograd cannot save; a clone outside of it is ordinary.
    with torch.inference_mode(False):
        return tensor.detach().cpu().clone().contiguous()


def _parse_entry(data: bytes, key: str) -> dict[str, Tensor]:
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    if metadata["format"] != FORMAT or metadata["key"] != key:
        raise ValueError(f"it was written for key {metadata['key'][:12]}, format {metadata['format']}")
    tensors = parse_safetensors(data)
    if metadata["sha256"] != _checksum(key, tensors):
        raise ValueError("checksum differs")
    return tensors


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
