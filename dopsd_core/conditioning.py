"""Dual conditioning (arXiv 2605.05204, section 3): what the student reads, what its teacher sees, computed once and
kept on disk.

The student's condition comes from the caption alone, the teacher's from the caption AND the target image. Both are
computed before training, so that the encoders can leave memory, and cached under everything that decides them. An
entry that is damaged or does not belong to its key is computed anew, never trusted.

Legend: L tokens, D features, C h w latent channels and size, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from .atomic import write_atomic

log = logging.getLogger("dopsd")

FORMAT = "dopsd-conditions-1"


@dataclass(frozen=True, eq=False)
class Condition:
    """What the denoiser is told about one sample, without a batch dimension.

    features: [L, D], the text encoder's hidden states. reference_latents: each [C, h, w], for families that edit.
    """

    features: Tensor
    reference_latents: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """The same condition elsewhere; shares memory where nothing changes."""
        return Condition(
            self.features.to(device, dtype), tuple(latent.to(device, dtype) for latent in self.reference_latents)
        )


@dataclass(frozen=True, eq=False)
class DualCondition:
    """One training pair after encoding: everything the training loop needs of it.

    target_latent: [C, h, w] fp32, model space; its shape is that of the rollout. key: the cache key, an identity of
    the pair.
    """

    student: Condition
    teacher: Condition
    target_latent: Tensor | None
    caption: str
    key: str


class Encoder(Protocol):
    """A host's text encoder, vision tower and VAE. Called without gradients; images are [3, H, W] fp32 in [0, 1]."""

    @property
    def identity(self) -> str:
        """Names weights, template and settings: two encoders with one identity give the same tensors."""
        ...

    def encode_text(self, caption: str) -> Condition:
        """The student's condition."""
        ...

    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """The teacher's condition, from image [3, H, W] in [0, 1] and caption."""
        ...

    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [C, h, w] in model space (about unit variance)."""
        ...


@dataclass(frozen=True, eq=False)
class EncodeRequest:
    """One (image, caption) to encode. `load_image` gives [3, H, W] in [0, 1], already cropped; called on a cache miss
    only.

    image_digest: `digest_bytes` of the image FILE. settings: whatever else decides the pixels, JSON-able ({"bucket":
    [64, 64]}).
    """

    image_digest: str
    caption: str
    load_image: Callable[[], Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


OnEncoded = Callable[[int, int, bool], None]
"""(number done, total, whether it came from the cache)."""


def digest_bytes(data: bytes) -> str:
    """SHA-256 of an image file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def cache_key(kind: str, image_digest: str, caption: str, identity: str, settings: Mapping[str, Any]) -> str:
    """64 hex digits that change whenever an input does; fields are delimited, so none can run into the next.

    Raises:
        TypeError: settings are not JSON-able.
    """
    fields = [FORMAT, kind, image_digest, caption, identity, dict(settings)]
    return digest_bytes(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode())


class ConditionCache:
    """Encoded tensors in `folder`, one safetensors file per key, each carrying its key and a checksum of its contents.

    Several processes may use one folder: files appear whole, by rename.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """Where the entry of `key` is kept."""
        return self.folder / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors on the CPU, or None when there is none that can be trusted (a warning says why)."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cached condition %s cannot be read (%s); computing it anew", path, error)
            return None
        try:
            return _parse_entry(data, key)
        except Exception as error:  # a damaged file can fail in any way inside the parser
            log.warning("cached condition %s is damaged or stale (%s); computing it anew", path, error)
            return None

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the entry atomically, in place of any older one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "key": key, "sha256": _checksum(key, whole)}
        write_atomic(self.path(key), format_safetensors(whole, metadata))

    def get_or_compute(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
        """The entry of `key`, and whether it was there; computed and stored when it was not.

        A folder that cannot be written costs the cache, not the run.
        """
        found = self.load(key)
        return (found, True) if found is not None else (self.keep(key, compute()), False)

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stores the entry and gives it back as ordinary tensors on the CPU; warns where it cannot be written."""
        plain = {name: _plain_cpu(tensor) for name, tensor in tensors.items()}
        try:
            self.store(key, plain)
        except OSError as error:
            log.warning("cached condition %s cannot be written (%s); going on without", self.path(key), error)
        return plain


def encode_dataset(
    requests: Sequence[EncodeRequest],
    encoder: Encoder,
    cache: ConditionCache | None,
    on_encoded: OnEncoded | None = None,
) -> list[DualCondition]:
    """Both conditions and the target latent of every request, in order, on the CPU; from the cache where it has them.

    Latents first, then conditions: where memory holds the VAE or the text encoder, each is brought in once.

    Raises:
        ValueError: the encoder returns a shape or a non-finite value that training could not use.
    """
    keys = [cache_key("pair", r.image_digest, r.caption, encoder.identity, r.settings) for r in requests]
    known = {key: cache.load(key) if cache is not None else None for key in dict.fromkeys(keys)}
    latents = {
        key: _encode_target(request, encoder)
        for key, request in dict(zip(keys, requests, strict=True)).items()
        if known[key] is None
    }
    pairs = []
    for done, (key, request) in enumerate(zip(keys, requests, strict=True), 1):
        tensors = known[key]
        hit = tensors is not None
        if tensors is None:
            tensors = known[key] = _keep(cache, key, _encode_pair(request, encoder, latents.pop(key)))
        pairs.append(_unpack_pair(tensors, request.caption, key))
        if on_encoded is not None:
            on_encoded(done, len(requests), hit)
    return pairs


def encode_texts(
    captions: Sequence[str],
    encoder: Encoder,
    cache: ConditionCache | None,
    settings: Mapping[str, Any] | None = None,
    on_encoded: OnEncoded | None = None,
) -> list[Condition]:
    """Text-only conditions on the CPU: anchors (prompts without the trigger) and prompts of previews."""
    conditions = []
    for done, caption in enumerate(captions, 1):
        key = cache_key("text", "", caption, encoder.identity, settings or {})
        tensors, hit = _cached(cache, key, lambda caption=caption: _encode_text(caption, encoder))
        conditions.append(_unpack_condition("student", tensors))
        if on_encoded is not None:
            on_encoded(done, len(captions), hit)
    return conditions


# -- packing ----------------------------------------------------------------------------------------------------------


def _cached(
    cache: ConditionCache | None, key: str, compute: Callable[[], Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], bool]:
    return cache.get_or_compute(key, compute) if cache is not None else (_keep(None, key, compute()), False)


def _keep(cache: ConditionCache | None, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return cache.keep(key, tensors) if cache else {name: _plain_cpu(tensor) for name, tensor in tensors.items()}


def _image(request: EncodeRequest) -> Tensor:
    image = request.load_image()
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image of {request.caption!r} must be [3, H, W], got {tuple(image.shape)}")
    return image


@torch.no_grad()
def _encode_target(request: EncodeRequest, encoder: Encoder) -> Tensor:
    latent = encoder.encode_latent(_image(request)).float()
    if latent.ndim != 3:
        raise ValueError(f"encode_latent must return [C, h, w], got {tuple(latent.shape)}")
    return _plain_cpu(latent)


@torch.no_grad()
def _encode_pair(request: EncodeRequest, encoder: Encoder, target_latent: Tensor) -> dict[str, Tensor]:
    image = _image(request)
    tensors = _pack_condition("student", encoder.encode_text(request.caption))
    tensors |= _pack_condition("teacher", encoder.encode_image_text(image, request.caption))
    tensors["target_latent"] = target_latent
    return _checked(tensors, request.caption)


@torch.no_grad()
def _encode_text(caption: str, encoder: Encoder) -> dict[str, Tensor]:
    return _checked(_pack_condition("student", encoder.encode_text(caption)), caption)


def _pack_condition(role: str, condition: Condition) -> dict[str, Tensor]:
    if condition.features.ndim != 2:
        raise ValueError(f"{role} features must be [L, D], got {tuple(condition.features.shape)}")
    packed = {f"{role}.features": condition.features}
    return packed | {f"{role}.reference.{i}": latent for i, latent in enumerate(condition.reference_latents)}


def _unpack_condition(role: str, tensors: Mapping[str, Tensor]) -> Condition:
    count = sum(name.startswith(f"{role}.reference.") for name in tensors)
    references = tuple(tensors[f"{role}.reference.{i}"] for i in range(count))
    return Condition(tensors[f"{role}.features"], references)


def _unpack_pair(tensors: Mapping[str, Tensor], caption: str, key: str) -> DualCondition:
    student, teacher = _unpack_condition("student", tensors), _unpack_condition("teacher", tensors)
    return DualCondition(student, teacher, tensors["target_latent"], caption, key)


def _checked(tensors: dict[str, Tensor], caption: str) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the encoder gave non-finite {name} for caption {caption!r}; load it in a wider dtype")
    return tensors


def _plain_cpu(tensor: Tensor) -> Tensor:
    # Encoders may run in inference mode, whose tensors autograd cannot save; a clone outside it is an ordinary tensor.
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
