"""The demo model's small autoencoder in pure torch: 64x64 images to 8x8 latents of 16 channels and back.

AutoencoderTiny and AutoencoderKL upsample by repetition and would take too long to learn sharp edges (figures in
docs/demo-model.md); pixel shuffling learns them in minutes. Latents have mean 0 and variance 1 per channel and are used
by the diffusion model without scaling.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
DOWNSCALE = 8  # pixels per latent, both ways


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))) for x [B, channels, H, W]; starts as the identity."""

    def __init__(self, channels: int, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.conv2 = conv(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, channels, H, W] -> the same shape."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class DemoAutoencoder(nn.Module):
    """Encodes images [B, 3, H, W] in [-1, 1] to latents [B, 16, H/8, W/8] ~ N(0, 1) and decodes them.

    H and W are multiples of 8. Deterministic: there is no posterior to sample. conv: the class of the convolutions, for
    hosts that store weights on another device than they compute on.
    """

    def __init__(self, fine: int = 96, coarse: int = 160, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), conv(48, fine, 3, padding=1), ResidualBlock(fine, conv),
            conv(fine, coarse, 2, stride=2), ResidualBlock(coarse, conv), conv(coarse, LATENT_CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            conv(LATENT_CHANNELS, coarse, 3, padding=1), ResidualBlock(coarse, conv), ResidualBlock(coarse, conv),
            conv(coarse, 4 * fine, 1), nn.PixelShuffle(2), ResidualBlock(fine, conv), ResidualBlock(fine, conv),
            conv(fine, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip

    def encode(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> latent [B, 16, H/8, W/8]."""
        return self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, 16, h, w] -> image [B, 3, 8h, 8w], about [-1, 1]."""
        return self.decoder(latent)
