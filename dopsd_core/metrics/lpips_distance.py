"""LPIPS-D: perceptual distance with VGG-16 (Zhang et al. 2018), through the authors' package lpips."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .needs import MetricUnavailable, Needs
from .pixels import resized_to

LPIPS = Needs("LPIPS-D", "lpips torchvision", "timm/vgg16.tv_in1k", ("*.safetensors",))
"""The package contains LPIPS' own weights; these are VGG-16's, as torchvision trained them on ImageNet."""


class LpipsDistance:
    """LPIPS with VGG-16, in fp32, on images in [-1, 1]."""

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device

    @classmethod
    def load(cls, weights: str | Path, device: torch.device | str = "cpu", download: bool = False) -> LpipsDistance:
        """Loads VGG-16 into the package's network.

        Args:
            weights: hub id, folder, or file (.safetensors or torchvision's .pth) with `features.0.weight` and so on.

        Raises:
            MetricUnavailable: the package or the weights are missing.
        """
        with LPIPS.imported():
            import lpips
        with warnings.catch_warnings():  # about how the package calls torchvision
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        file = LPIPS.file_in(LPIPS.weights(weights, download), "*.safetensors", "vgg16*.pth")
        network.net.load_state_dict(_renamed(_read(file), network.net.state_dict(), file))
        return cls(network, device)

    @torch.no_grad()
    def __call__(self, source: Tensor, generated: Tensor) -> float:
        """The distance, lower is better: source [3, h, w] and generated [3, H, W], both in [0, 1]."""
        pair = (resized_to(source, generated), generated)
        first, second = (image[None].to(self._device, torch.float32) for image in pair)
        return float(self._network(first, second, normalize=True))


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _renamed(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """torchvision's tensors under the package's names: "features.5.weight" -> "slice2.5.weight"."""
    names = {name: re.sub(r"^slice\d+", "features", name) for name in wanted}
    if missing := [name for name in names.values() if name not in tensors]:
        raise MetricUnavailable(
            f"LPIPS-D: {file} has no {missing[0]}; give torchvision's VGG-16, such as {LPIPS.hub_id}"
        )
    return {name: tensors[theirs] for name, theirs in names.items()}
