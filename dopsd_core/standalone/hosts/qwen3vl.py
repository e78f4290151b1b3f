"""Images for transformers' Qwen3-VL, as its image processor prepares them."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from ...demo.model_files import VISION_CELL, resize_for_vision


def image_patches(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """image [3, H, W] in [0, 1] -> (patches [N, 1536] in merge order, two equal frames, in [-1, 1]; grid [[1, h, w]]).

    Args:
        size: (height, width) at which it is seen, multiples of 32.
    """
    big = image.float() if tuple(image.shape[1:]) == size else resize_for_vision(image.float(), size)
    rows, columns = (side // VISION_CELL for side in size)
    pattern = "c (y j p) (x i q) -> (y x j i) (c frames p q)"
    patches = repeat(big * 2 - 1, pattern, j=2, p=16, i=2, q=16, frames=2)
    return patches, torch.tensor([[1, 2 * rows, 2 * columns]])
