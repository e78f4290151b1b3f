"""The host of Qwen-Image 2.1 without ComfyUI: diffusers' transformer and VAE, transformers' Qwen3-VL.

    pipe = QwenImage21Pipeline.from_pretrained("Qwen/Qwen-Image-2.1-Turbo", torch_dtype=torch.bfloat16)
    denoiser = QwenImage21Denoiser(pipe.transformer)
    encoder = QwenImage21Encoder(pipe.text_encoder.model, pipe.processor.tokenizer, pipe.vae, identity="...")

Text, references and image are one sequence: each reference stands where the prompt names it, and tokens see what is
before them. The text encoder sees the references too; its features of their pixels make room for their latents. For the
teacher `vlm` they stay, and there are no latents. Keys and values of the references are not cached: they are trained.

Legend: B batch, h w latent size, H W pixels, L tokens, D = 4096 features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3VLModel

from ...conditioning.encode import Condition
from ...conditioning.seen_size import MAX_PIXELS, MIN_PIXELS, seen_size
from ...families import QWEN_IMAGE21, Family
from .diffusers_denoiser import DiffusersDenoiser
from .fit import require_qwen3vl
from .parts import ModelParts
from .qwen3vl import image_patches
from .qwen3vl_encoder import IMAGE_MARK, FileParts, GivenParts, Qwen3VLEncoder, image_places

_SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_START, _ENDING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_PER_SLOT = 4
"""Latent pixels for one token of the vision tower: 2 x 2."""


class QwenImage21Denoiser(DiffusersDenoiser[QwenImage21Transformer2DModel]):
    """diffusers' Qwen-Image 2.1 transformer as a Denoiser, with frozen weights in their own dtype."""

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in calling order."""
        blocks: Any = self.transformer.transformer_blocks
        return list(blocks)

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, 64, h, w] fp32 -> x0_hat, same shape. Conditions of different layouts run one after the other.

        Raises:
            ValueError: a condition has references without `slots`, or one with an odd side.
        """
        layouts = {(len(c.features), c.slots, tuple(r.shape for r in c.reference_latents)) for c in conditions}
        if len(layouts) > 1:
            samples = zip(x.split(1), conditions, strict=True)
            return torch.cat([self.predict_x0(sample, sigma, [condition]) for sample, condition in samples])
        dtype, (height, width) = self.compute_dtype, x.shape[-2:]
        references = [torch.stack(r) for r in zip(*(c.reference_latents for c in conditions), strict=True)]
        images = [latents.to(x.device, dtype) for latents in (*references, x)]
        features, is_image = _with_room(conditions, height * width // _PER_SLOT)
        out = self.transformer(
            hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1),
            encoder_hidden_states=features.to(x.device, dtype),
            timestep=torch.full((len(x),), sigma, device=x.device),
            img_shapes=[[(1, image.shape[-2], image.shape[-1]) for image in images]] * len(x),
            img_mask=is_image.to(x.device).expand(len(x), -1),
            return_dict=False,
        )[0]
        velocity = out[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
        return x - sigma * velocity.float()


def _with_room(conditions: Sequence[Condition], image_slots: int) -> tuple[Tensor, Tensor]:
    """Features [B, L, D] with zeros where references stand, and where images stand [1, L + image_slots], bool."""
    first = conditions[0]
    if len(first.slots) != len(first.reference_latents):
        raise ValueError(
            f"a condition has {len(first.reference_latents)} references and {len(first.slots)} places for them: encode "
            "it with encode_with_references"
        )
    if any(side % 2 for latent in first.reference_latents for side in latent.shape[-2:]):
        raise ValueError("the sides of a reference latent must be even: crop the image to multiples of 32 pixels")
    texts = torch.stack([condition.features for condition in conditions])
    pieces, marks, begin = [], [], 0
    for slot, latent in zip(first.slots, first.reference_latents, strict=True):
        count = latent.shape[-2] * latent.shape[-1] // _PER_SLOT
        pieces += [texts[:, begin:slot], texts.new_zeros(len(texts), count, texts.shape[-1])]
        marks += [False] * (slot - begin) + [True] * count
        begin = slot
    pieces.append(texts[:, begin:])
    marks += [False] * (texts.shape[1] - begin) + [True] * image_slots
    return torch.cat(pieces, dim=1), torch.tensor([marks])


class QwenImage21Encoder(Qwen3VLEncoder):
    """transformers' Qwen3-VL and diffusers' RGBA VAE as an Encoder that also `ReadsReferences`.

    Args:
        tokenizer: Qwen's, of transformers.
        identity: a name that is equal for equal weights.
    """

    family: ClassVar[Family] = QWEN_IMAGE21
    channels: ClassVar[int] = 4

    def __init__(self, model: Qwen3VLModel, tokenizer: Any, vae: AutoencoderKLQwenImage21, identity: str) -> None:
        super().__init__(GivenParts(model, tokenizer, vae, identity))

    @torch.no_grad()
    def encode_text(self, caption: str) -> Condition:
        """Features [L, D] of the caption."""
        return Condition(self._read([], caption)[0])

    @torch.no_grad()
    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """Features [L, D] of image [3, H, W] in [0, 1], seen at 512^2 to 768^2 pixels and kept, and caption."""
        size = seen_size(image.shape[1], image.shape[2], MIN_PIXELS, MAX_PIXELS)
        return Condition(self._read([image_patches(image, size)], caption)[0])

    @torch.no_grad()
    def encode_with_references(self, images: Sequence[Tensor], caption: str) -> Condition:
        """Features [L, D] of the caption, which has seen images [3, H, W] in [0, 1] at their own sizes, and `slots`.

        Raises:
            ValueError: a side is not a multiple of 32.
        """
        if any(side % 32 for image in images for side in image.shape[1:]):
            raise ValueError("reference images need sides that are multiples of 32 pixels: crop them")
        seen = [image_patches(image, (image.shape[1], image.shape[2])) for image in images]
        features, is_image = self._read(seen, caption)
        text = ~is_image
        starts = [place for place in range(1, len(text)) if is_image[place] and text[place - 1]]
        return Condition(features[text], slots=tuple(int(text[:place].sum()) for place in starts))

    def _read(self, images: Sequence[tuple[Tensor, Tensor]], caption: str) -> tuple[Tensor, Tensor]:
        """Features [L, D] fp32 (CPU) behind the system's turn, and which are of an image [L]; images: patches and grid.

        The last layer's output, without the final norm: what the norm reads.
        """
        counts = [int(grid.prod() // 4) for _, grid in images]
        names = " ".join(
            f"<image{number}><|vision_start|>{IMAGE_MARK * count}<|vision_end|>"
            for number, count in enumerate(counts, 1)
        )
        text = f"{_SYSTEM}{_START}{names}{caption or ' '}{_ENDING}"
        model, tokenizer = self._parts.model, self._parts.tokenizer
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        is_image = image_places(tokenizer, ids, sum(counts), caption)
        seen: dict[str, Tensor] = {}
        if images:
            patches, grids = (torch.cat(parts).to(model.device) for parts in zip(*images, strict=True))
            seen = {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": is_image.long()}
        states: list[Tensor] = []
        norm: Any = model.language_model.norm
        hook = norm.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **seen)
        finally:
            hook.remove()
        system = len(tokenizer(_SYSTEM)["input_ids"])
        return states[-1][system:].float().cpu(), is_image[0, system:].cpu()


class QwenImage21FileEncoder(QwenImage21Encoder):
    """The same, from files; each model is loaded when it is needed.

    Args:
        parts: the files.
        device: where it encodes.
        sees: not used, the text encoder holds the vision tower.

    Raises:
        ValueError: a part is damaged, or of another model.
    """

    def __init__(self, parts: ModelParts, device: torch.device, sees: bool) -> None:
        require_qwen3vl(parts.files, width="context_in_dim", layers=1)
        Qwen3VLEncoder.__init__(self, FileParts(parts, device, AutoencoderKLQwenImage21, None))
