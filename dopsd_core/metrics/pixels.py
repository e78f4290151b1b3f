"""Images as metrics read them: resized to each other, normalised.

Legend: H, W the size of the generated image in pixels; h, w of the source.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resized_to(source: Tensor, generated: Tensor) -> Tensor:
    """The source [3, h, w] in [0, 1], resized bicubic to the size of the generated image [3, H, W], without a crop."""
    size = (generated.shape[-2], generated.shape[-1])
    if tuple(source.shape[-2:]) == size:
        return source
    return F.interpolate(source[None].float(), size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def imagenet_normalised(image: Tensor) -> Tensor:
    """An image [3, H, W] in [0, 1] with ImageNet's mean subtracted, over ImageNet's standard deviation."""
    mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image.float() - mean) / std
