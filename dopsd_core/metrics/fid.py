"""FID: Fréchet distance of Inception features of two sets of images, through torchmetrics and torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .needs import MetricUnavailable, Needs

FID = Needs(
    "FID",
    "torchmetrics torch-fidelity",
    "pt_inception-2015-12-05-6726825d.pth (github.com/toshas/torch-fidelity/releases)",
)
FEATURES = 2048
"""Size of the features of the last pooling layer, as in the literature."""


class FrechetInceptionDistance:
    """FID of real and generated images; a set of less than `FEATURES` images has a biased FID."""

    def __init__(self, metric: Any, device: torch.device | str = "cpu") -> None:
        self._metric, self._device = metric.to(device), device

    @classmethod
    def load(cls, weights: str | Path, device: torch.device | str = "cpu") -> FrechetInceptionDistance:
        """Loads Inception v3 from torch-fidelity's file, or from a folder that contains it.

        Raises:
            MetricUnavailable: the packages or the weights are missing.
        """
        with FID.imported():
            import torch_fidelity  # noqa: F401  torchmetrics needs it for Inception
            from torchmetrics.image.fid import FrechetInceptionDistance as Metric
        file = FID.file_in(FID.weights(weights), "pt_inception*.pth")
        try:
            torch.load(file, map_location="meta", weights_only=True)  # the library itself would run pickled code
        except Exception as error:
            raise MetricUnavailable(f"FID: {file} is not a file of weights; give {FID.hub_id}") from error
        return cls(Metric(feature=FEATURES, normalize=True, feature_extractor_weights_path=str(file)), device)

    @torch.no_grad()
    def __call__(self, real: Iterable[Tensor], generated: Iterable[Tensor]) -> float:
        """The distance, lower is better; images [3, H, W] in [0, 1] of any size, at least two of each.

        Raises:
            ValueError: a set has fewer than two images.
        """
        self._metric.reset()
        for images, is_real in ((real, True), (generated, False)):
            count = 0
            for image in images:
                self._metric.update(image[None].to(self._device, torch.float32), real=is_real)
                count += 1
            if count < 2:
                raise ValueError(
                    f"FID needs at least two {'real' if is_real else 'generated'} images, there are {count}"
                )
        return float(self._metric.compute())
