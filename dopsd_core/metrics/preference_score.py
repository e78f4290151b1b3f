"""HPSv3 (arXiv 2508.03789), the open quality score: human preference for an image, given its prompt.

The paper's own reward models are not public; its authors point to HPSv3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..image_grid import to_images
from .needs import Needs

HPSV3 = Needs("HPSv3", "hpsv3 (in an environment of its own: it fixes old versions of its libraries)", "MizzenAI/HPSv3")


class HumanPreferenceScore:
    """The mean of the preference that the package's reward model predicts."""

    def __init__(self, inferencer: Any) -> None:
        self._inferencer = inferencer

    @classmethod
    def load(
        cls, weights: str | Path, device: torch.device | str = "cpu", download: bool = False
    ) -> HumanPreferenceScore:
        """Loads the reward model through its own package, which also reads Qwen2-VL-7B-Instruct from the hub's cache.

        Args:
            weights: file HPSv3.safetensors, a folder with it and optionally the package's .yaml configuration, or hub
                id.

        Raises:
            MetricUnavailable: the package or the weights are missing.
        """
        with HPSV3.imported():
            from hpsv3 import HPSv3RewardInferencer  # pyright: ignore[reportMissingImports]
        path = HPSV3.weights(weights, download)
        file = HPSV3.file_in(path, "HPSv3.safetensors", "*.safetensors")
        configs = sorted(file.parent.glob("*.yaml"))
        settings: Mapping[str, str] = {"config_path": str(configs[0])} if configs else {}
        return cls(HPSv3RewardInferencer(checkpoint_path=str(file), device=str(device), **settings))

    @torch.no_grad()
    def __call__(self, image: Tensor, prompt: str) -> float:
        """The score, higher is better, of an image [3, H, W] in [0, 1] and its prompt."""
        rewards = self._inferencer.reward(image_paths=to_images([image]), prompts=[prompt])
        return float(rewards[0][0])  # the second is the deviation
