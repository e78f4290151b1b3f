"""A CLIP that answers questions about images: ComfyUI's Qwen3-VL can generate text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor


def can_answer(clip: Any, num_images: int) -> bool:
    """Whether the CLIP generates text and sees so many images."""
    blank = [torch.zeros(3, 32, 32)] * num_images
    return hasattr(clip.cond_stage_model, "generate") and _count_images(_tokens(clip, blank, "")) == num_images


def answer(clip: Any, images: Sequence[Tensor], question: str, max_length: int) -> str:
    """The CLIP's answer, decoded greedily, of at most `max_length` tokens; images [3, H, W] in [0, 1] come first.

    Raises:
        InterruptProcessingException: the user has cancelled.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    tokens = _tokens(clip, images, question)
    return clip.decode(clip.generate(tokens, do_sample=False, max_length=max_length))


def _tokens(clip: Any, images: Sequence[Tensor], text: str) -> Any:
    return clip.tokenize(text, images=[image.movedim(0, -1)[None] for image in images])


def _count_images(tokens: Any) -> int:
    rows = next(iter(tokens.values())) if isinstance(tokens, dict) else tokens
    return sum(isinstance(token[0], dict) and token[0].get("type") == "image" for row in rows for token in row)
