"""Few-step sharpness: whether the images of a few steps are as sharp as those of the untouched model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def laplacian_energy(images: Tensor) -> Tensor:
    """Mean absolute Laplacian [n] of images [n, 3, H, W]: high for sharp edges, but also for noise."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device)[None, None].expand(3, 1, 3, 3)
    return F.conv2d(images.float().clamp(0, 1), kernel, groups=3).abs().mean((1, 2, 3))


def relative_sharpness(image: Tensor, reference: Tensor) -> float:
    """Laplacian energy of an image [3, H, W] over that of a reference [3, h, w]: 1 if equally sharp, less if blurry."""
    return float(laplacian_energy(image[None]) / laplacian_energy(reference[None]).clamp(min=1e-8))
