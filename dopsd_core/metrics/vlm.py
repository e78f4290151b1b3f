"""A vision-language model of transformers that answers questions about images, such as Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..image_grid import to_images
from .needs import Needs
from .vlm_questions import MAX_NEW_TOKENS

VLM = Needs("VLM-J", "transformers torchvision", "Qwen/Qwen3-VL-8B-Instruct")


class TransformersVlm:
    """An `Ask`: answers greedily."""

    def __init__(
        self, model: Any, processor: Any, device: torch.device | str = "cpu", max_new_tokens: int = MAX_NEW_TOKENS
    ) -> None:
        """max_new_tokens: longest answer."""
        self._model = model.eval().requires_grad_(False).to(device)
        self._processor, self._device, self._max_new_tokens = processor, device, max_new_tokens

    @classmethod
    def load(
        cls,
        weights: str | Path,
        device: torch.device | str = "cpu",
        download: bool = False,
        *,
        needs: Needs = VLM,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> TransformersVlm:
        """Loads model and processor, in the dtype of the weights.

        Args:
            weights: folder or hub id.
            device: where the model runs.
            download: whether a hub id may be downloaded.
            needs: names in messages what the model is for.
            max_new_tokens: longest answer.

        Raises:
            MetricUnavailable: a package or the weights are missing.
        """
        with needs.imported():
            from transformers import AutoModelForImageTextToText, AutoProcessor
        folder = needs.folder(needs.weights(weights, download))
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype="auto")
        return cls(model, processor, device, max_new_tokens)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], question: str) -> str:
        """The answer; images [3, H, W] in [0, 1] come before the question."""
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in to_images(images)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self._processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self._device)
        ids = self._model.generate(
            **inputs, max_new_tokens=self._max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        answer = ids[0, inputs["input_ids"].shape[1] :]
        return self._processor.tokenizer.decode(answer, skip_special_tokens=True)
