"""A stand-in for ComfyUI's Qwen-Image 2.1, which is newer than the ComfyUI that these tests run in.

It has the interface of ComfyUI's own classes, as read in ComfyUI's repository, and computes what diffusers' network
computes with the same weights: MODEL, CLIP with its vision tower, RGBA VAE. Import only after the `comfyui` fixture has
booted ComfyUI.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch
import towers
import toy
from comfy import sd1_clip
from comfy.text_encoders import qwen3vl
from qwen_image21_network import AXES, HEAD, HEADS, TEXT_WIDTH, Network
from torch import Tensor, nn

LANGUAGE = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}  # fmt: skip
_SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_TEMPLATE = _SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_START = 151644

# -- ComfyUI's classes around it ---------------------------------------------------------------------------------------


class Latents(comfy.latent_formats.LatentFormat):
    """64 channels at a sixteenth, each with a mean and a standard deviation."""

    latent_channels = 64
    spacial_downscale_ratio = 16

    def __init__(self) -> None:
        numbers = torch.arange(64.0).view(1, -1, 1, 1)
        self.latents_mean, self.latents_std = (numbers - 32) / 40, 1 + numbers / 80

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.latents_mean.to(latent)) / self.latents_std.to(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return latent * self.latents_std.to(latent) + self.latents_mean.to(latent)


class Model(comfy.model_base.BaseModel):
    """Passes references and their places to the network; a sampling switches the prefix cache on."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        kind = comfy.model_base.ModelType.FLUX
        super().__init__(model_config, kind, device=device, unet_model=Network)

    @property
    def current_patcher(self) -> Any:
        return self._current_patcher

    @current_patcher.setter
    def current_patcher(self, patcher: Any) -> None:
        self._current_patcher = patcher
        network = getattr(self, "diffusion_model", None)
        if network is not None:
            network.reset_prefix_cache(patcher is not None)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        if (text := kwargs.get("cross_attn")) is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(text)
        if (references := kwargs.get("reference_latents")) is not None:
            out["ref_latents"] = comfy.conds.CONDList([self.process_latent_in(latent) for latent in references])
        if (slots := kwargs.get("image_slots")) is not None:
            out["image_slots"] = comfy.conds.CONDConstant(slots)
        return out


class QwenImage21(comfy.supported_models_base.BASE):
    unet_config = {"image_model": "qwen_image21"}
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"multiplier": 1.0, "shift": 0.69}
    latent_format = Latents
    memory_usage_factor = 6.0
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Any:
        return Model(self, device=device)


class QwenImage21Tokenizer(qwen3vl.Qwen3VLTokenizer):
    """Names each image, and says whether their features stay."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, model_type="qwen3vl_8b")
        self.llama_template = _TEMPLATE

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, llama_template: str | None = None, images: Any = (),
        keep_vision: bool = False, thinking: bool = True, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if llama_template is None and len(images) > 0:
            block = "<|vision_start|><|image_pad|><|vision_end|>"
            names = " ".join(f"<image{number}>{block}" for number in range(1, len(images) + 1))
            llama_template = _TEMPLATE.replace("{}", names + "{}")
        out = super().tokenize_with_weights(
            text, return_word_ids, llama_template=llama_template, images=list(images), thinking=thinking, **kwargs
        )
        return {**out, "keep_vision": keep_vision}


class _Reader(qwen3vl.Qwen3VLClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, **kwargs: Any) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, model_type="qwen3vl_8b")
        self.image_spans: list[tuple[int, int]] = []

    def process_tokens(self, tokens: Any, device: Any) -> Any:
        found = super().process_tokens(tokens, device)
        self.image_spans = [(info["index"], info["size"]) for info in found[3] if info["type"] == "image"]
        return found


class _TextEncoder(sd1_clip.SD1ClipModel):
    """Cuts off the system's turn and, unless they are to stay, the features of images, whose places it reports."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, name="qwen3vl_8b", clip_model=_Reader, model_options=model_options)

    def encode_token_weights(self, token_weight_pairs: Any) -> Any:
        out, pooled, extra = super().encode_token_weights(token_weight_pairs)
        spans = getattr(self, self.clip).image_spans
        first = [token[0] for token in token_weight_pairs["qwen3vl_8b"][0]]
        starts = [place for place, token in enumerate(first) if isinstance(token, int) and token == _START]
        keep = torch.ones(out.shape[1], dtype=torch.bool)
        keep[: starts[1] if len(starts) > 1 else 0] = False  # no image is before it
        extra.pop("attention_mask")
        if not token_weight_pairs.get("keep_vision", False) and spans:
            slots = []
            for start, size in spans:
                keep[start : start + size] = False
                slots.append(int(keep[:start].sum()))
            extra["image_slots"] = slots
        return out[:, keep], pooled, extra


@contextmanager
def installed() -> Iterator[None]:
    """Inside, ComfyUI has the classes under the names that it has them under."""
    module: Any = ModuleType("comfy.text_encoders.qwen_image21")
    module.QwenImage21Tokenizer = QwenImage21Tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.supported_models, "QwenImage21", QwenImage21, raising=False)
        patch.setitem(sys.modules, module.__name__, module)
        yield


# -- what loader nodes give --------------------------------------------------------------------------------------------


def model(layers: int = 2, text_width: int = TEXT_WIDTH, seed: int = 0) -> Any:
    """A MODEL whose weights are inference tensors."""
    config = QwenImage21({"image_model": "qwen_image21", "num_layers": layers, "context_in_dim": text_width})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        made = toy.network(config)
        toy.fill(made.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu)


def diffusers_network(model: Any) -> Any:
    """diffusers' QwenImage21Transformer2DModel with the MODEL's weights."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Transformer2DModel

    sizes, state = model.model.model_config.unet_config, {}
    for name, value in model.model.diffusion_model.state_dict().items():
        if name.endswith("img_mlp.gate_up.weight"):
            stem = name.removesuffix("gate_up.weight")
            state[f"{stem}gate_layer.weight"], state[f"{stem}proj.weight"] = value.chunk(2)
        else:
            state[name] = value
    network = QwenImage21Transformer2DModel(
        num_layers=sizes["num_layers"], attention_head_dim=HEAD, num_attention_heads=HEADS,
        context_in_dim=sizes["context_in_dim"], axes_dims_rope=AXES,
    )  # fmt: skip
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


def clip(seed: int = 1) -> Any:
    """A CLIP with a small vision tower."""
    tower = {name: value for name, value in towers.TOWER.items() if name != "out_hidden_size"}
    with torch.inference_mode(), toy.allocated(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_8b", tower)
        target = comfy.supported_models_base.ClipTarget(QwenImage21Tokenizer, _TextEncoder)
        made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "qwen3vl_8b_model_config": LANGUAGE})
        toy.fill(made.cond_stage_model, seed)
    return made


def qwen3vl_twin(clip: Any) -> Any:
    """transformers' Qwen3VLModel with the weights of the CLIP."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    own = clip.cond_stage_model.qwen3vl_8b.transformer
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    sizes: dict[str, Any] = {**LANGUAGE, "vocab_size": 151936, "head_dim": 128, "rope_parameters": rope}
    tower = {**towers.TOWER, "out_hidden_size": TEXT_WIDTH, "patch_size": 16, "spatial_merge_size": 2}
    whole = Qwen3VLModel(Qwen3VLConfig(text_config=sizes, vision_config=tower)).eval()
    whole.visual.load_state_dict(own.visual.state_dict())
    language = {name: value for name, value in own.model.state_dict().items() if name != "lm_head.weight"}
    whole.language_model.load_state_dict(language)
    return whole.requires_grad_(False)


class _Autoencoder(nn.Module):
    """Of RGBA images, by diffusers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]


def vaes(seed: int = 2) -> tuple[Any, Any]:
    """(ComfyUI's VAE of 64 channels for RGBA images, opaque where they have no alpha; diffusers' inside of it)."""
    from comfy.taesd.taesd import TAESD
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21

    theirs: Any = AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, dim_mult=[1, 1, 2, 2, 2])
    mean, std = (values.flatten().tolist() for values in (Latents().latents_mean, Latents().latents_std))
    theirs.register_to_config(latents_mean=mean, latents_std=std)
    toy.fill(theirs, seed).eval().requires_grad_(False)
    with torch.inference_mode():
        ours = comfy.sd.VAE(sd=TAESD(latent_channels=16).state_dict(), dtype=torch.float32)
    ours.first_stage_model = _Autoencoder(theirs)
    ours.patcher = comfy.model_patcher.ModelPatcher(ours.first_stage_model, ours.device, torch.device("cpu"))
    ours.latent_channels, ours.output_channels, ours.pad_channel_value = 64, 4, 1.0
    ours.upscale_ratio = ours.downscale_ratio = 16
    return ours, theirs
