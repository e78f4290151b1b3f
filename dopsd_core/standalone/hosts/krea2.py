"""The host of Krea 2 without ComfyUI: diffusers' transformer and VAE, transformers' Qwen3-VL, on any torch device.

    pipe = Krea2Pipeline.from_pretrained("krea/Krea-2-Turbo", torch_dtype=torch.bfloat16)
    denoiser = Krea2Denoiser(pipe.transformer)
    encoder = Krea2Encoder(pipe.text_encoder, pipe.tokenizer, pipe.vae, identity="krea/Krea-2-Turbo")

Texts are not padded, as in ComfyUI; diffusers' pipeline pads them in the middle and masks the padding.

Legend: B batch, h w latent size, H W pixels, L tokens, D = 12 * 2560 features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel
from einops import rearrange
from torch import Tensor, nn
from transformers import Qwen3VLModel

from ...conditioning.encode import Condition
from ...conditioning.seen_size import MAX_PIXELS, MIN_PIXELS, seen_size
from ...families import KREA2, Family
from ...families.krea2 import TEXT_LAYERS
from .diffusers_denoiser import DiffusersDenoiser
from .fit import require_qwen3vl
from .parts import ModelParts
from .qwen3vl import image_patches
from .qwen3vl_encoder import IMAGE_MARK, FileParts, GivenParts, Qwen3VLEncoder, image_places

TAPS = tuple(range(2, 36, 3))
"""The hidden states in the features, of 36 layers; 0 is the embedding."""
_SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_ENDING = "<|im_end|>\n<|im_start|>assistant\n"


class Krea2Denoiser(DiffusersDenoiser[Krea2Transformer2DModel]):
    """diffusers' Krea 2 transformer as a Denoiser, with frozen weights in their own dtype."""

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the text fusion and the main blocks, in calling order."""
        fusion = self.transformer.text_fusion
        return [*fusion.layerwise_blocks, *fusion.refiner_blocks, *self.transformer.transformer_blocks]

    def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        """x [B, 16, h, w] fp32 -> x0_hat, same shape. Conditions of different lengths run one after the other."""
        if len({len(condition.features) for condition in conditions}) > 1:
            samples = zip(x.split(1), conditions, strict=True)
            return torch.cat([self.predict_x0(sample, sigma, [condition]) for sample, condition in samples])
        dtype, (height, width) = self.compute_dtype, (side // 2 for side in x.shape[-2:])
        features = torch.stack([condition.features for condition in conditions]).to(x.device, dtype)
        out = self.transformer(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2).to(dtype),
            encoder_hidden_states=features.unflatten(-1, (TEXT_LAYERS, -1)),
            timestep=torch.full((len(x),), sigma, device=x.device),
            position_ids=_positions(features.shape[1], height, width).to(x.device),
            return_dict=False,
        )[0]
        return x - sigma * rearrange(out.float(), "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)


def krea2(blocks: int = 28, heads: int = 48, **settings: Any) -> Krea2Denoiser:
    """Krea 2 of this size, on the default device in the default dtype, weights not filled in."""
    sizes = {"num_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1)}
    hidden = 128 * -(-4 * (256 * heads // 3) // 128)  # as ComfyUI computes it from the width
    return Krea2Denoiser(Krea2Transformer2DModel(**sizes, intermediate_size=hidden, **settings))


class Krea2Encoder(Qwen3VLEncoder):
    """transformers' Qwen3-VL and diffusers' Qwen-Image VAE as an Encoder; the teacher sees through Qwen3-VL's tower.

    Args:
        tokenizer: Qwen's, of transformers.
        identity: a name that is equal for equal weights.
    """

    family: ClassVar[Family] = KREA2

    def __init__(self, model: Qwen3VLModel, tokenizer: Any, vae: AutoencoderKLQwenImage, identity: str) -> None:
        super().__init__(GivenParts(model, tokenizer, vae, identity))

    @property
    def identity(self) -> str:
        """Names the weights, the hidden states and the image size."""
        return f"{super().identity}/{TAPS}"

    @torch.no_grad()
    def encode_text(self, caption: str) -> Condition:
        """Features [L, D] of the caption."""
        return Condition(self._hidden(caption))

    @torch.no_grad()
    def encode_image_text(self, image: Tensor, caption: str) -> Condition:
        """Features [L, D] of image [3, H, W] in [0, 1], seen at 512^2 to 768^2 pixels, and caption."""
        size = seen_size(image.shape[1], image.shape[2], MIN_PIXELS, MAX_PIXELS)
        pixels, grid = image_patches(image, size)
        return Condition(self._hidden(caption, int(grid.prod() // 4), pixel_values=pixels, image_grid_thw=grid))

    def _hidden(self, caption: str, count: int = 0, **vision: Tensor) -> Tensor:
        """Features [L, D] fp32 (CPU) behind the system's part of the template: the inputs of the layers in `TAPS`.

        count: tokens of the image before the caption.
        """
        model, tokenizer = self._parts.model, self._parts.tokenizer
        seen = f"<|vision_start|>{IMAGE_MARK * count}<|vision_end|>" if count else ""
        ids = tokenizer(f"{_SYSTEM}{seen}{caption}{_ENDING}", return_tensors="pt")["input_ids"].to(model.device)
        system = len(tokenizer(_SYSTEM)["input_ids"])
        is_image = image_places(tokenizer, ids, count, caption)
        if vision:
            vision = {name: value.to(model.device) for name, value in vision.items()}
            vision["mm_token_type_ids"] = is_image.long()
        states: list[Tensor] = []
        layers = [model.language_model.layers[number] for number in TAPS]
        hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0])) for layer in layers]
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **vision)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(states, dim=-1)[system:].float().cpu()


class Krea2FileEncoder(Krea2Encoder):
    """The same, from files; each model is loaded when it is needed.

    Args:
        parts: the files.
        device: where it encodes.
        sees: not used, the text encoder holds the vision tower.

    Raises:
        ValueError: a part is damaged, or of another model.
    """

    def __init__(self, parts: ModelParts, device: torch.device, sees: bool) -> None:
        require_qwen3vl(parts.files, width="text_hidden_dim", layers=TAPS[-1] + 1)
        Qwen3VLEncoder.__init__(self, FileParts(parts, device, AutoencoderKLQwenImage, _converted))


def _converted(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The single file's tensors under diffusers' names; shapes as diffusers'."""
    return convert_wan_vae_to_diffusers(state)


def _positions(text: int, height: int, width: int) -> Tensor:
    """(t, h, w) of every token, [text + height * width, 3]: texts stand at 0."""
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())
    return torch.cat([torch.zeros(text, 3), image])
