"""CLIP, VAE and the teacher's vision tower as the core's Encoder."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from torch import Tensor

from ...dopsd_core.conditioning.encode import Condition
from ...dopsd_core.conditioning.teachers import Teacher, choose_teacher
from .denoiser import fingerprint
from .families import family_of_clip, in_comfyui
from .vision import TeacherVision, encode_image_text, text_encoder


def teacher_for(encoder: ComfyEncoder, mode: str, edits: bool, sentence: str, others: bool = False) -> Teacher:
    """The teacher that `mode` means for the encoder's family, with the user's sentence; `edits`: the data has sources.

    Raises:
        ValueError: there is no such teacher, or it needs a vision tower and none is connected.
    """
    teacher = choose_teacher(encoder.family.teachers, mode, edits).with_sentence(sentence, others)
    if teacher.sees == "features":
        encoder.require_vision()
    return teacher


class ComfyEncoder:
    """Encodes captions, pictures with captions, and pictures. Models come to the device when they are called."""

    def __init__(self, clip: Any, vae: Any, vision: TeacherVision | None) -> None:
        self.family = family_of_clip(clip)
        self._clip, self._vae, self._vision = clip, vae, vision
        self._latent_format = in_comfyui(self.family).model.latent_format()
        parts = [fingerprint(clip.patcher), fingerprint(vae.patcher)]
        if vision is not None:
            parts += [fingerprint(vision.patcher), f"{vision.min_pixels}-{vision.max_pixels}"]
        self._identity = "/".join(("comfyui", self.family.name, *parts))

    @property
    def identity(self) -> str:
        """Other for other weights or another family."""
        return self._identity

    def require_vision(self) -> TeacherVision:
        """The vision tower.

        Raises:
            ValueError: none is connected, or not the one that goes with the CLIP.
        """
        if self._vision is None:
            raise ValueError(
                "the teacher needs eyes: connect `vision` of Load Teacher Vision (Qwen3-VL-4B) or Load Demo Models"
            )
        text_encoder(self._clip, self._vision)
        return self._vision

    def encode_text(self, caption: str) -> Condition:
        """What Clip Text Encode gives for the caption."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = self._clip.encode_from_tokens(self._clip.tokenize(caption), return_dict=True)
        return Condition(encoded["cond"][0])

    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """image [3, H, W] in [0, 1] and caption, read together."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return Condition(encode_image_text(self._clip, self.require_vision(), caption, image))

    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [C, h, w] in the model's space."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._latent_format.process_in(self._vae.encode(image.movedim(0, -1)[None]))[0].float()
