"""CLIP, VAE and vision tower as the core's Encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...dopsd_core.conditioning.cache import plain_cpu
from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.conditioning.teachers import Background, TeacherView, choose_teacher
from .embeddings import EMBEDDING
from .families import family_of_clip, in_comfyui, without_time
from .fits import require_training_vae
from .identity import identity_of
from .vision import (
    TeacherVision,
    count_tokens,
    encode_image_text,
    encode_with_references,
    has_tower,
    image_tokens,
    text_encoder,
)


def teacher_for(
    encoder: ComfyEncoder,
    mode: str,
    edits: bool,
    sentence: str,
    others: bool = False,
    background: Background = "keep",
) -> TeacherView:
    """The teacher that `mode` selects for the encoder's family, with the user's sentence.

    Args:
        edits: whether the dataset has source images.
        others: whether the teacher sees other images than the one being trained.
        background: what it sees around the subject of images with a mask.

    Raises:
        ValueError: there is no such teacher, it sees edits with another background, or it needs a vision tower and
            none is connected.
    """
    chosen = choose_teacher(encoder.family.teachers, mode, edits).with_background(background)
    teacher = chosen.with_sentence(sentence, others)
    if teacher.sees == "features":
        encoder.require_vision()
    return teacher


class ComfyEncoder:
    """Encodes captions, images with captions, and images; each model is loaded to the device when it is called.

    They run in inference mode, as in ComfyUI's own nodes: weights created in it must only be moved in it, or later uses
    of them fail. The results are ordinary tensors on the CPU.

    Attributes:
        notes: for the user, one line each.

    Raises:
        ValueError: CLIP and VAE do not belong to the same supported family.
    """

    def __init__(self, clip: Any, vae: Any, vision: TeacherVision | None) -> None:
        self.family = family_of_clip(clip)
        require_training_vae(vae, clip)
        self._clip, self._vae, self._vision = clip, vae, None if has_tower(clip) else vision
        entry = in_comfyui(self.family)
        self._latent_format = entry.model.latent_format()
        rounding, found = str(comfy.model_management.intermediate_dtype()), identity_of(clip, vae, self._vision)
        self._identity = "/".join(("comfyui", self.family.name, rounding, found.digest))
        self.notes = (*found.notes, *((entry.remark,) if entry.remark else ()))

    @property
    def identity(self) -> str:
        """Changes with the family and with everything that changes what CLIP, VAE and vision tower compute."""
        return self._identity

    def identity_for(self, caption: str) -> str:
        """`identity`, with the contents of the embedding files that the caption names."""
        if EMBEDDING not in caption:
            return self._identity
        return f"{self._identity}/{identity_of(self._clip.tokenize(caption)).digest}"

    def require_vision(self) -> None:
        """Checks that the teacher can see images.

        Raises:
            ValueError: the CLIP holds no vision tower, and none is connected or it does not belong to the CLIP.
        """
        text_encoder(self._clip, self._vision)

    @torch.inference_mode()
    def encode_text(self, caption: str) -> Condition:
        """The condition that CLIP Text Encode gives for the caption; features [L, D]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = self._clip.encode_from_tokens(self._clip.tokenize(caption), return_dict=True)
        return Condition(plain_cpu(encoded["cond"][0]))

    @torch.inference_mode()
    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """The teacher's condition for image [3, H, W] in [0, 1] and caption, features [L, D]; a long caption is cut."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return Condition(plain_cpu(encode_image_text(self._clip, self._vision, caption, image)))

    @torch.inference_mode()
    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [C, h, w] in the model's space.

        Raises:
            ValueError: the VAE gives latents of another shape than the family's.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = self._latent_format.process_in(self._vae.encode(image.movedim(0, -1)[None]))
        latent = without_time(encoded, self.family)[0].float()
        wanted = self.family.latent_shape(image.shape[2], image.shape[1])
        if tuple(latent.shape) != wanted:
            raise ValueError(
                f"the input vae makes latents of shape {list(latent.shape)} where {self.family.title} has "
                f"{list(wanted)}: connect Load VAE with {in_comfyui(self.family).vae_file}"
            )
        return plain_cpu(latent)

    # -- lengths ------------------------------------------------------------------------------------------------------

    def count_text(self, caption: str, seen: int | None = None) -> int:
        """Tokens of the caption in the CLIP's template, without padding; seen: tokens of an image read with it."""
        return count_tokens(self._clip, caption, seen)

    def count_image(self, width: int, height: int) -> int:
        """Tokens of the vision tower for an image of this size in pixels."""
        return image_tokens(self._vision, width, height)


class ReferringEncoder(ComfyEncoder):
    """One whose text encoder also reads the images that the network gets as references."""

    @torch.inference_mode()
    def encode_with_references(self, images: Sequence[Tensor], caption: str) -> Condition:
        """Features [L, D] of the caption after images, each [3, H, W] in [0, 1], and their `slots`.

        Raises:
            ValueError: a side is not a multiple of 32, or the CLIP does not report where the images stand.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        condition = encode_with_references(self._clip, images, caption)
        return replace(condition, features=plain_cpu(condition.features))


def new_encoder(clip: Any, vae: Any, vision: TeacherVision | None) -> ComfyEncoder:
    """The encoder of the CLIP's family.

    Raises:
        ValueError: CLIP and VAE do not belong to the same supported family.
    """
    referring = in_comfyui(family_of_clip(clip)).reader.sees_references
    return (ReferringEncoder if referring else ComfyEncoder)(clip, vae, vision)
