"""Trains the demo's autoencoder (16 latent channels, f8).

Its latents are normalized to mean 0 and variance 1 per channel (the running statistics are folded into the last
encoder layer at the end), so that the diffusion model uses them without scaling. With --start, the decoder of an
autoencoder is trained further and its latents stay the same.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ...demo.autoencoder import DemoAutoencoder
from ...demo.model_files import load_vae
from ...demo.world import BACKGROUNDS, render, sample_scenes
from ...number_text import float_argument, int_argument
from ..judge import laplacian_energy
from .batched import autocast
from .optim import SharedMuon
from .stage import Stage, StageRun
from .twins import Twins, launch

EDGES = 0.1  # weight of the second differences: without it flat areas are speckled, 13 % too much Laplacian energy
LATENT_NOISE = 0.06  # makes the decoder robust: the diffusion model's samples are never exact


def reconstruction_loss(out: Tensor, image: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted squared + absolute error, with weight 6 on the badge; plain MSE), both scalar.

    out, image: [B, 3, 64, 64] in [-1, 1]. background: [B, 3, 1, 1].
    """
    badge = ((image - background).abs().amax(1, keepdim=True) > 0.05).float()
    weight = 1 + 5 * F.max_pool2d(badge, 5, 1, 2)
    error = out - image
    return (weight * (error.square() + 0.05 * error.abs())).mean(), error.square().mean()


def edge_loss(out: Tensor, image: Tensor) -> Tensor:
    """Mean absolute Laplacian of the difference of two [B, 3, 64, 64]; scalar."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None].expand(3, 1, 3, 3)
    return F.conv2d(out - image, kernel, groups=3).abs().mean()


def fold_normalisation(model: DemoAutoencoder, norm: nn.BatchNorm2d) -> None:
    """Folds (z - mean) / std into the encoder's last convolution."""
    conv = model.encoder[-1]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    assert norm.running_mean is not None and norm.running_var is not None
    mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        conv.weight /= std[:, None, None, None]
        conv.bias.copy_((conv.bias - mean) / std)


class Autoencoding(nn.Module):
    """The autoencoder with the running statistics of its latents.

    start: file of an autoencoder whose encoder is frozen; its latents are normalized already.
    """

    def __init__(self, start: Path | None = None) -> None:
        super().__init__()
        self.model = DemoAutoencoder() if start is None else load_vae(start)
        self.norm = nn.BatchNorm2d(16, affine=False, momentum=0.02) if start is None else None
        self.model.encoder.requires_grad_(start is None)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.palette = torch.tensor(list(BACKGROUNDS.values()))

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """(loss on `batch` new renders, scalar; PSNR in dB)."""
        scenes = sample_scenes(batch, generator)
        image = (render(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with autocast():
            latent = self.model.encoder(image)
        latent = latent.float() if self.norm is None else self.norm(latent.float())
        latent = latent + LATENT_NOISE * torch.randn(latent.shape, generator=generator)
        with autocast():
            out = self.model.decoder(latent).float()
        background = self.palette[scenes.background][:, :, None, None] * 2 - 1
        loss, mse = reconstruction_loss(out, image, background)
        loss = loss + EDGES * edge_loss(out, image)
        return loss, {"psnr": -10 * math.log10(mse.item() / 4)}


def train(twins: Twins, args: argparse.Namespace) -> None:
    """Trains in one worker process; resumes from its newest checkpoint."""
    torch.manual_seed(0)
    both = Autoencoding(args.start)
    stage = Stage("autoencoder", args.folder, args.steps, args.batch, 0, decay=0.5, average=0.99, minutes=args.minutes)
    trained = [(name, p) for name, p in both.named_parameters() if p.requires_grad]
    optimizer = SharedMuon(twins, trained, None, args.peak, weight_decay=1e-3)
    if StageRun(twins, stage, both, optimizer).run(both.loss) and twins.rank == 0:
        finish(both.model, both.norm, args.folder)


@torch.no_grad()
def finish(model: DemoAutoencoder, norm: nn.BatchNorm2d | None, folder: Path) -> None:
    """Folds the statistics into the encoder, prints PSNR and sharpness and writes `vae.safetensors`."""
    scenes = sample_scenes(1024, torch.Generator().manual_seed(99))
    image = render(scenes) * 2 - 1
    if norm is not None:
        latent = torch.cat([model.encoder(p) for p in image.split(64)])  # statistics of the averaged weights
        norm.running_mean.copy_(latent.mean((0, 2, 3)))  # type: ignore[union-attr]
        norm.running_var.copy_(latent.var((0, 2, 3)))  # type: ignore[union-attr]
        fold_normalisation(model, norm)
    out = torch.cat([model.decoder(model.encoder(p)) for p in image[:256].split(64)]).clamp(-1, 1)
    psnr = -10 * torch.log10((out - image[:256]).square().mean((1, 2, 3)) / 4)
    sharpness = laplacian_energy(out / 2 + 0.5).mean() / laplacian_energy(image[:256] / 2 + 0.5).mean()
    print(f"vae: {psnr.mean():.2f} dB on 256 new images (worst {psnr.min():.2f}), sharpness {sharpness:.3f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "vae.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="file of an autoencoder whose decoder is trained further")
    parser.add_argument("--steps", type=int_argument(), default=2400)
    parser.add_argument("--batch", type=int_argument(), default=8, help="per worker")
    parser.add_argument("--peak", type=float_argument(), default=1.5e-3)
    parser.add_argument("--minutes", type=float_argument(), default=0.0, help="checkpoint and stop after this long")
    parser.add_argument("--workers", type=int_argument(), default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    launch(train, args, workers=args.workers)
