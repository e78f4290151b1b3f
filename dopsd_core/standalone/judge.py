"""An independent judge of the demo's images: a small classifier trained only on real renders.

It was not trained on generated images. Its accuracy per attribute measures concept and prompt following; the
distribution of its features, compared with real renders, gives the Fréchet distance (the FID of this small world).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..demo.world import NUM_CLASSES
from ..metrics.sharpness import laplacian_energy

__all__ = ["FEATURES", "Judge", "frechet_distance", "judge_features", "judged_right", "laplacian_energy", "load_judge"]

FEATURES = 128


def _conv(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class Judge(nn.Module):
    """Images [B, 3, 64, 64] in [0, 1] -> features [B, 128] -> logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2), _conv(12, 48, 1), _conv(48, 64, 2), _conv(64, 64, 1), _conv(64, 96, 2),
            _conv(96, 96, 1), _conv(96, 96, 2), nn.Flatten(), nn.Linear(96 * 16, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, n) for name, n in NUM_CLASSES.items()})

    def features(self, images: Tensor) -> Tensor:
        """images [B, 3, 64, 64] in [0, 1] -> features [B, 128]."""
        return self.body(images * 2 - 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, 64, 64] in [0, 1] -> logits [B, classes] per attribute."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def load_judge(path: Path) -> Judge:
    """The frozen judge with the file's weights, fp32."""
    judge = Judge()
    judge.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    )
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def judged_right(judge: Judge, images: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bool [n] per attribute: whether the judge's class of images [n, 3, 64, 64] equals `labels` (int64 [n] each)."""
    logits = [judge(part.clamp(0, 1)) for part in images.split(256)]
    return {name: torch.cat([part[name] for part in logits]).argmax(1) == want for name, want in labels.items()}


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor) -> Tensor:
    """Features [n, 128] fp64 of images [n, 3, 64, 64]."""
    return torch.cat([judge.features(part.clamp(0, 1)) for part in images.split(256)]).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (AB)^(1/2)) of two feature sets [n, d], [m, d] (Heusel et al. 2017, Eq. 6).

    tr (AB)^(1/2) is the sum of the square roots of the eigenvalues of AB, which are real and not negative.
    """
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * root)
