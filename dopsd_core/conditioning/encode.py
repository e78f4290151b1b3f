"""Dual conditioning (arXiv 2605.05204, section 3): conditions of student and teacher, encoded once and cached on disk.

The student's condition comes from the caption only, the teacher's from the caption AND the target image. Both are
assembled from parts: features of a text, features of an image with a text, the latent of an image. Each part is
encoded once before training, so that the encoders can be unloaded, and cached under everything that determines it. A
damaged or mismatched entry is encoded again.

Legend: L tokens, D features, C h w latent channels and size, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..transfer import to_device
from .cache import ConditionCache, cache_key, plain_cpu
from .teachers import VLM, TeacherView


@dataclass(frozen=True, eq=False)
class Condition:
    """The denoiser's conditioning for one sample, without a batch dimension.

    Attributes:
        features: [L, D], hidden states of the text encoder.
        reference_latents: each [C, h, w], for families that edit.
        slots: for each reference the number of features before it, in families whose text names its references; () in
            those whose references follow the image.
    """

    features: Tensor
    reference_latents: tuple[Tensor, ...] = ()
    slots: tuple[int, ...] = ()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """The condition on another device or in another dtype; shares memory where nothing changes."""
        latents = tuple(to_device(latent, device, dtype) for latent in self.reference_latents)
        return replace(self, features=to_device(self.features, device, dtype), reference_latents=latents)


@dataclass(frozen=True, eq=False)
class DualCondition:
    """One encoded training pair. Pairs with the same text or image share its tensors.

    Attributes:
        student: condition of the student, from the caption only.
        teacher: condition of the teacher, from caption and image.
        target_latent: [C, h, w] fp32 in model space; the rollout has the same shape. None if there is no image.
        caption: the caption.
        key: identifies the pair.
    """

    student: Condition
    teacher: Condition
    target_latent: Tensor | None
    caption: str
    key: str


class Encoder(Protocol):
    """Hooks that a host implements with its text encoder, vision tower and VAE; called without gradients.

    Images are [3, H, W] fp32 in [0, 1].
    """

    @property
    def identity(self) -> str:
        """Identifies weights, template and settings: encoders with equal identities return equal tensors."""
        ...

    def encode_text(self, caption: str) -> Condition:
        """The student's condition, features [L, D] of the caption only."""
        ...

    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """Features [L, D] of image [3, H, W] in [0, 1] and caption together, for teachers with a vision tower."""
        ...

    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [C, h, w] in model space (about unit variance)."""
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """An encoder that reads files named in captions, such as embeddings."""

    def identity_for(self, caption: str) -> str:
        """`identity` for this caption; it changes with the contents of the files that the caption names."""
        ...


@runtime_checkable
class ReadsReferences(Protocol):
    """An encoder whose text encoder also sees the images that the network gets as references."""

    def encode_with_references(self, images: Sequence[Tensor], caption: str) -> Condition:
        """Features [L, D] of the caption after images, each [3, H, W] in [0, 1], without the images' own features, and
        the `slots` of the images."""
        ...


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An image to encode.

    Attributes:
        digest: `digest_bytes` of the image FILE.
        load: returns [3, H, W] in [0, 1], already cropped; called only on a cache miss.
        settings: everything else that determines the pixels, JSON-serializable ({"bucket": [64, 64]}).
    """

    digest: str
    load: Callable[[], Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class EncodeRequest:
    """One pair to encode.

    Attributes:
        target: the image to learn.
        caption: the student's text.
        sources: the source images of an edit.
        shown: the image that the teacher sees; None for the target.
    """

    target: ImageInput
    caption: str
    sources: tuple[ImageInput, ...] = ()
    shown: ImageInput | None = None


OnEncoded = Callable[[int, int, bool], None]
"""(number done, total, whether it came from the cache)."""


def encode_dataset(
    requests: Sequence[EncodeRequest],
    encoder: Encoder,
    cache: ConditionCache | None,
    on_encoded: OnEncoded | None = None,
    teacher: TeacherView = VLM,
) -> list[DualCondition]:
    """Encodes both conditions [L, D] and the target latent [C, h, w] of every request, in order, on the CPU.

    Cached parts are loaded. Latents are encoded before conditions, so that the VAE and the text encoder are each
    loaded once if memory holds only one of them.

    Raises:
        ValueError: the encoder returns a wrong shape or a non-finite value, or the teacher edits and a request has no
            source image.
    """
    parts, fresh = _Parts(encoder, cache), []
    for request in requests:
        before = parts.computed
        for image in _images(request, teacher):
            parts.latent(image)
        fresh.append(parts.computed > before)
    pairs = []
    for done, request in enumerate(requests, 1):
        before = parts.computed
        pairs.append(_compose(request, teacher, parts))
        if on_encoded is not None:
            on_encoded(done, len(requests), parts.computed == before and not fresh[done - 1])
    return pairs


def encode_texts(
    captions: Sequence[str], encoder: Encoder, cache: ConditionCache | None, on_encoded: OnEncoded | None = None,
    sources: Sequence[tuple[ImageInput, ...]] = (),
) -> list[Condition]:  # fmt: skip
    """Encodes the student's conditions [L, D] on the CPU: anchors (prompts without the trigger) and preview prompts.

    sources: the images that each caption edits; none for prompts alone.
    """
    parts, conditions = _Parts(encoder, cache), []
    images = list(sources) or [()] * len(captions)
    for image in (image for some in images for image in some):  # before the texts, see `encode_dataset`
        parts.latent(image)
    for done, (caption, edited) in enumerate(zip(captions, images, strict=True), 1):
        before = parts.computed
        conditions.append(parts.referring(edited, caption))
        if on_encoded is not None:
            on_encoded(done, len(captions), parts.computed == before)
    return conditions


def encode_captioned(
    requests: Sequence[EncodeRequest],
    encoder: Encoder,
    cache: ConditionCache | None,
    on_encoded: OnEncoded | None = None,
) -> list[tuple[Condition, Tensor]]:
    """(condition [L, D] of the caption, latent [C, h, w] of the target) of every request, on the CPU; no teacher.

    Raises:
        ValueError: the encoder returns a wrong shape or a non-finite value.
    """
    parts = _Parts(encoder, cache)
    latents = [parts.latent(request.target) for request in requests]
    encoded = []
    for done, (request, latent) in enumerate(zip(requests, latents, strict=True), 1):
        before = parts.computed
        encoded.append((parts.text(request.caption), latent))
        if on_encoded is not None:
            on_encoded(done, len(requests), parts.computed == before)
    return encoded


# -- a pair from its parts --------------------------------------------------------------------------------------------


def _images(request: EncodeRequest, teacher: TeacherView) -> list[ImageInput]:
    """The images of the pair whose latents are needed."""
    shown = [request.shown] if request.shown is not None and teacher.sees == "reference" else []
    return [request.target, *(request.sources if teacher.edits else ()), *shown]


def _compose(request: EncodeRequest, teacher: TeacherView, parts: _Parts) -> DualCondition:
    if teacher.edits and not request.sources:
        raise ValueError(f"the teacher {teacher.name!r} needs a source image, and {request.caption!r} has none")
    shown = request.shown or request.target
    sources = request.sources if teacher.edits else ()
    if teacher.sees == "features":
        latents = tuple(parts.latent(image) for image in sources)
        seeing = _with_references(parts.seen(shown, teacher.text(request.caption)), latents)
    elif teacher.sees == "nothing":
        seeing = parts.referring(sources, teacher.text(request.caption))
    else:
        seeing = parts.referring((*sources, shown), teacher.text(request.caption))
    student = parts.referring(sources, request.caption)
    key = pair_key(request, parts.encoder, teacher)
    return DualCondition(student, seeing, parts.latent(request.target), request.caption, key)


def pair_key(request: EncodeRequest, encoder: Encoder, teacher: TeacherView) -> str:
    """The key of the pair that a request becomes; it changes with everything that is encoded for it."""
    images = [request.target, request.shown or request.target, *request.sources]
    facts = {"teacher": [teacher.name, teacher.sentence], "pictures": [[p.digest, dict(p.settings)] for p in images]}
    if (reads := _identity_for(encoder, teacher.sentence)) != encoder.identity:  # it names a file
        facts["reads"] = [reads]
    return cache_key("pair", request.target.digest, request.caption, _identity_for(encoder, request.caption), facts)


def _identity_for(encoder: Encoder, caption: str) -> str:
    return encoder.identity_for(caption) if isinstance(encoder, ReadsFiles) else encoder.identity


def _with_references(condition: Condition, latents: tuple[Tensor, ...]) -> Condition:
    return replace(condition, reference_latents=condition.reference_latents + latents)


class _Parts:
    """The parts of pairs: each is encoded once or loaded from the cache. `computed` counts the encoded ones."""

    def __init__(self, encoder: Encoder, cache: ConditionCache | None) -> None:
        self.encoder, self._cache = encoder, cache
        self._known: dict[str, dict[str, Tensor]] = {}
        self.computed = 0

    def identity_for(self, caption: str) -> str:
        """The encoder's identity for this caption."""
        return _identity_for(self.encoder, caption)

    def text(self, caption: str) -> Condition:
        """Features of the caption only."""
        key = cache_key("text", "", caption, self.identity_for(caption), {})
        return _unpack(self._get(key, f"the text {caption!r}", lambda: _pack(self.encoder.encode_text(caption))))

    def seen(self, image: ImageInput, caption: str) -> Condition:
        """Features of image and caption together."""
        key = cache_key("seen", image.digest, caption, self.identity_for(caption), image.settings)
        what = f"an image and {caption!r}"
        return _unpack(
            self._get(key, what, lambda: _pack(self.encoder.encode_image_text(_pixels(image, what), caption)))
        )

    def referring(self, images: Sequence[ImageInput], caption: str) -> Condition:
        """Features of the caption, which refers to the images, with their latents."""
        latents = tuple(self.latent(image) for image in images)
        encoder = self.encoder
        if not images or not isinstance(encoder, ReadsReferences):
            return _with_references(self.text(caption), latents)
        digests, settings = "/".join(image.digest for image in images), [dict(image.settings) for image in images]
        key = cache_key("referring", digests, caption, self.identity_for(caption), {"images": settings})
        what = f"{len(images)} images and {caption!r}"

        def encode() -> dict[str, Tensor]:
            return _pack(encoder.encode_with_references([_pixels(image, what) for image in images], caption))

        return _with_references(_unpack(self._get(key, what, encode)), latents)

    def latent(self, image: ImageInput) -> Tensor:
        """[C, h, w] fp32 of the image."""
        key = cache_key("latent", image.digest, "", self.encoder.identity, image.settings)
        return self._get(key, "an image", lambda: self._encode_latent(image))["latent"]

    def _encode_latent(self, image: ImageInput) -> dict[str, Tensor]:
        latent = self.encoder.encode_latent(_pixels(image, "an image")).float()
        if latent.ndim != 3:
            raise ValueError(f"encode_latent must return [C, h, w], got {tuple(latent.shape)}")
        return {"latent": latent}

    def _get(self, key: str, what: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if key not in self._known:
            found = self._cache.load(key) if self._cache is not None else None
            self._known[key] = found if found is not None else self._encode(key, what, compute)
        return self._known[key]

    @torch.no_grad()
    def _encode(self, key: str, what: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        self.computed += 1
        tensors = compute()
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the encoder returned non-finite {name} for {what}; load it in a wider dtype")
        if self._cache is not None:
            return self._cache.keep(key, tensors)
        return {name: plain_cpu(tensor) for name, tensor in tensors.items()}


def _pixels(image: ImageInput, what: str) -> Tensor:
    pixels = image.load()
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"image for {what} must be [3, H, W], got {tuple(pixels.shape)}")
    return pixels


# -- packing ----------------------------------------------------------------------------------------------------------


def _pack(condition: Condition) -> dict[str, Tensor]:
    if condition.features.ndim != 2:
        raise ValueError(f"features must be [L, D], got {tuple(condition.features.shape)}")
    references = {f"reference.{i}": latent for i, latent in enumerate(condition.reference_latents)}
    slots = {"slots": torch.tensor(condition.slots)} if condition.slots else {}
    return {"features": condition.features, **references, **slots}


def _unpack(tensors: Mapping[str, Tensor]) -> Condition:
    count = sum(name.startswith("reference.") for name in tensors)
    slots = tensors["slots"].tolist() if "slots" in tensors else ()
    return Condition(tensors["features"], tuple(tensors[f"reference.{i}"] for i in range(count)), tuple(slots))
