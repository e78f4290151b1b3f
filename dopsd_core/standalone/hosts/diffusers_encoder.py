"""Text encoder, VAE and vision tower of a diffusers pipeline as an Encoder.

A model is loaded when it is first needed and moved to the device while it is; the others wait in RAM. What is cached is
not encoded again, so a run that resumes loads none of them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...conditioning.encode import Condition
from ...families import Family
from .parts import ModelParts
from .teacher_reader import VisionFiles

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_CAPTION = "{}"


class DiffusersEncoder:
    """What the families have in common; each has its pipeline, its hidden states and its latents' normalisation.

    Args:
        parts: the model.
        device: where it encodes.
        sees: whether images are read with captions, which needs the vision tower.
    """

    family: ClassVar[Family]
    thinking: ClassVar[bool]
    """Argument of the chat template, as in the pipeline."""

    states: ClassVar[tuple[int, ...]]
    """Indices of the hidden states that the features consist of."""

    least: ClassVar[int]
    """Texts are padded to this many tokens."""

    def __init__(self, parts: ModelParts, device: torch.device, sees: bool) -> None:
        self._parts, self._device = parts, device
        self._vision: VisionFiles | None = parts.vision() if sees else None
        self._moved: list[nn.Module] = []
        facts = (parts.digest("text_encoder", "vae"), parts.digest_tokenizer(), parts.options.dtype)
        seen = self._vision.digest() if self._vision is not None else ""
        self._identity = "/".join(("diffusers", type(self).__name__, *facts, seen))

    @property
    def identity(self) -> str:
        """Changes with the weights, their dtype and the vision tower."""
        return self._identity

    @torch.no_grad()
    def encode_text(self, caption: str) -> Condition:
        """Features [L, D] that the pipeline encodes the caption to."""
        self._use(self._text_encoder)
        return Condition(self._features(caption).cpu())

    @torch.no_grad()
    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """Features [L, D] of image [3, H, W] in [0, 1] and caption, in the pipeline's template; a long caption is cut.

        Raises:
            ValueError: there is no vision tower.
        """
        reader = self._reader
        self._use(reader.model)
        text = self._prompt(_IMAGE + _CAPTION)
        before, _, after = text.partition(_CAPTION)
        ids = self._tokenizer(f"{before}{caption}{after}")["input_ids"]
        ending, pad = len(self._tokenizer(after)["input_ids"]), self._tokenizer.pad_token_id
        return Condition(reader.read(image, ids, ending, self.least, pad, self.states).cpu())

    @torch.no_grad()
    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [C, h, w] in the model's space."""
        self._use(self._vae)
        return self._to_latents(image[None].to(self._device) * 2 - 1)[0].float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] in the model's space -> images [B, 3, H, W] in [0, 1] on the CPU, one at a time."""
        self._use(self._vae)
        images = [self._to_images(latent[None].to(self._device)) for latent in latents.float()]
        return torch.cat(images).add(1).div(2).clamp(0, 1).float().cpu()

    def release(self) -> None:
        """Moves everything off the device."""
        for module in self._moved:
            module.to("cpu")
        self._moved.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- of a family --------------------------------------------------------------------------------------------------

    def _features(self, caption: str) -> Tensor:
        raise NotImplementedError

    def _load_vae(self) -> Any:
        raise NotImplementedError

    def _new_pipeline(self, text_encoder: Any, tokenizer: Any) -> Any:
        raise NotImplementedError

    def _to_latents(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _to_images(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    # -- loaded on first use ------------------------------------------------------------------------------------------

    @cached_property
    def _text_encoder(self) -> Any:
        return self._parts.text_encoder()

    @cached_property
    def _tokenizer(self) -> Any:
        return self._parts.tokenizer(needs_template=True)

    @cached_property
    def _vae(self) -> Any:
        return self._load_vae()

    @cached_property
    def _pipeline(self) -> Any:
        return self._new_pipeline(self._text_encoder, self._tokenizer)

    @cached_property
    def _reader(self) -> Any:
        if self._vision is None:
            raise ValueError("the teacher reads no images here: choose --teacher-view vlm")
        return self._parts.reader(self._text_encoder, self._vision)

    def _prompt(self, content: str) -> str:
        """The content in the pipeline's chat template."""
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True,
            enable_thinking=self.thinking,
        )  # fmt: skip

    def _use(self, module: nn.Module) -> None:
        """Moves a model to the device and the others off it; the reader shares weights with the text encoder."""
        if self._device.type == "cpu" or self._moved == [module]:
            return
        self.release()
        module.to(self._device)
        self._moved.append(module)
