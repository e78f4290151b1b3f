"""What the encoders have in common whose text encoder is a whole Qwen3-VL: Krea 2's and Qwen-Image 2.1's.

The text encoder holds the vision tower, so the teacher `vlm` needs no further file. The models are given, as parts of a
pipeline, or loaded from files when they are needed.

Legend: B batch, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...conditioning.seen_size import MAX_PIXELS, MIN_PIXELS
from ...families import Family
from .parts import Converted, ModelParts

IMAGE_MARK = "<|image_pad|>"


class Qwen3VLParts(Protocol):
    """The parts of an encoder. A model is on its device when it is asked for."""

    @property
    def identity(self) -> str:
        """A name that is equal for equal weights."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Qwen's, of transformers."""
        ...

    @property
    def model(self) -> Any:
        """transformers' Qwen3VLModel."""
        ...

    @property
    def vae(self) -> Any:
        """diffusers' autoencoder."""
        ...

    def release(self) -> None:
        """Moves everything off the device."""
        ...


class GivenParts:
    """Models that are where the caller has put them.

    Args:
        model: transformers' Qwen3VLModel.
        tokenizer: Qwen's, of transformers.
        vae: diffusers' autoencoder.
        identity: a name that is equal for equal weights.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, vae: nn.Module, identity: str) -> None:
        self.model, self.vae = (part.eval().requires_grad_(False) for part in (model, vae))
        self.tokenizer, self.identity = tokenizer, identity

    def release(self) -> None:
        """They stay where they are."""


class FileParts:
    """Models from files, loaded on first use; one at a time is on the device.

    Args:
        parts: the files.
        device: where they run.
        vae: class of the autoencoder.
        converted: as in `ModelParts.vae`; None if the family's single file cannot be read.
    """

    def __init__(self, parts: ModelParts, device: torch.device, vae: Any, converted: Converted | None) -> None:
        self._parts, self._device, self._vae_class, self._converted = parts, device, vae, converted
        self._moved: nn.Module | None = None
        facts = (parts.digest("text_encoder", "vae"), parts.digest_tokenizer(), parts.options.dtype)
        self.identity = "/".join(("diffusers", *facts))
        if converted is None and parts.files.vae is not None:
            raise ValueError(f"{parts.files.vae} cannot be read for this model: leave --vae out, and give --base")

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded from the files."""
        return self._parts.tokenizer()

    @property
    def model(self) -> Any:
        """The text encoder, on the device."""
        return self._on_device(self._text_encoder)

    @property
    def vae(self) -> Any:
        """The autoencoder, on the device."""
        return self._on_device(self._vae)

    def release(self) -> None:
        """Moves the model that is on the device to RAM."""
        if self._moved is not None:
            self._moved.to("cpu")
            self._moved = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def _text_encoder(self) -> Any:
        return self._parts.text_encoder()

    @cached_property
    def _vae(self) -> Any:
        return self._parts.vae(self._vae_class, self._converted or _refused)

    def _on_device(self, module: nn.Module) -> nn.Module:
        if self._device.type != "cpu" and self._moved is not module:
            self.release()
            module.to(self._device)
            self._moved = module
        return module


class Qwen3VLEncoder:
    """Latents and identity; each family adds how it reads texts and images.

    Attributes:
        family: the family.
        channels: of the pixels that its VAE encodes: 3, or 4 with an opaque alpha.
    """

    family: ClassVar[Family]
    channels: ClassVar[int] = 3

    def __init__(self, parts: Qwen3VLParts) -> None:
        self._parts = parts

    @property
    def identity(self) -> str:
        """Names the family, the weights and the image size of the teacher `vlm`."""
        return f"{self.family.name}/{self._parts.identity}/{MIN_PIXELS}-{MAX_PIXELS}"

    @torch.no_grad()
    def encode_latent(self, image: Tensor) -> Tensor:
        """image [3, H, W] in [0, 1] -> latent [C, h, w] fp32."""
        vae = self._parts.vae
        pixels = torch.cat([image, image.new_ones(self.channels - 3, *image.shape[1:])]) * 2 - 1
        encoded: Any = vae.encode(pixels[None, :, None].to(vae.device, vae.dtype))
        mean, std = _statistics(vae)
        return ((encoded.latent_dist.mode()[0, :, 0].float() - mean) / std).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1] on the CPU, one at a time, without their alpha."""
        vae = self._parts.vae
        mean, std = _statistics(vae)
        images = []
        for latent in latents.float().split(1):
            values = (latent.to(mean.device) * std + mean).to(vae.dtype)
            images.append(vae.decode(values.unsqueeze(2), return_dict=False)[0][:, :3, 0])
        return torch.cat(images).float().add(1).div(2).clamp(0, 1).cpu()

    def release(self) -> None:
        """Moves everything off the device, if the models come from files."""
        self._parts.release()


def image_places(tokenizer: Any, ids: Tensor, count: int, caption: str) -> Tensor:
    """Which of the ids [1, L] are places of images, bool, for a template with `count` of them around the caption.

    Raises:
        ValueError: there are more or less: the caption has its own, or the tokenizer is another model's.
    """
    mark = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    if mark is None or mark == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {IMAGE_MARK}: it is another model's, download this one's again")
    found = ids == mark
    if int(found.sum()) != count:
        raise ValueError(f"the caption {caption[:40]!r} has a place for an image: write it without {IMAGE_MARK}")
    return found


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, each [C, 1, 1] on its device."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(v, device=vae.device).view(-1, 1, 1) for v in values)
    return mean, std


def _refused(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    raise NotImplementedError
