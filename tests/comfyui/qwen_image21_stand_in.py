"""A stand-in for ComfyUI's Qwen-Image 2.1, which is newer than the ComfyUI that these tests run in.

It has the interface of ComfyUI's own classes, as read in ComfyUI's repository, and computes what diffusers' network
computes with the same weights: MODEL, CLIP with its vision tower, RGBA VAE. Import only after the `comfyui` fixture has
booted ComfyUI.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch
import towers
import toy
from comfy import sd1_clip
from comfy.ldm.modules.attention import optimized_attention
from comfy.text_encoders import qwen3vl
from torch import Tensor, nn
from torch.nn import functional

TEXT_WIDTH, HEAD, HEADS = 64, 32, 2
LANGUAGE = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}  # fmt: skip
_SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_TEMPLATE = _SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_START = 151644

# -- the network -------------------------------------------------------------------------------------------------------


class _TextNorm(nn.Module):
    """Stores its scale minus one."""

    def __init__(self, width: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight + 1, 1e-6)


class _Text(nn.Module):
    def __init__(self, inside: int, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.text_norm = _TextNorm(inside, factory)
        self.in_layer = operations.Linear(inside, width, bias=False, **factory)
        self.out_layer = operations.Linear(width, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(functional.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))


class _Mlp(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.gate_up = operations.Linear(width, 6 * width, bias=False, **factory)
        self.out = operations.Linear(3 * width, width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Outside of training, as with ComfyUI's fused kernel for 8 bits, the last layer is read and not called."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        activated = functional.silu(gate).mul_(up)
        if comfy.model_management.in_training:
            return self.out(activated)
        return functional.linear(activated, self.out.weight)


class _Attention(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width, bias=False, **factory) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(width, width, bias=False, **factory)])
        self.norm_q, self.norm_k = (operations.RMSNorm(HEAD, eps=1e-6, **factory) for _ in range(2))

    def forward(self, x: Tensor, layout: _Layout, cache: dict[str, Tensor] | None, options: Any) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, HEAD)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = layout.turned(self.norm_q(q)), layout.turned(self.norm_k(k))
        if cache is not None:  # keys and values of the prefix are those of the first step
            own = {"k": k[:, : layout.prefix], "v": v[:, : layout.prefix]}
            own = {name: cache.setdefault(name, value.detach()) for name, value in own.items()}
            k, v = (torch.cat([own[name], new[:, layout.prefix :]], 1) for name, new in (("k", k), ("v", v)))
        seen = [
            optimized_attention(
                q[:, start:end].flatten(2), k[:, :end].flatten(2), v[:, :end].flatten(2), HEADS, mask=mask,
                transformer_options=options, preferred_attention=None,
            )
            for start, end, mask in layout.segments
        ]  # fmt: skip
        return self.to_out[0](torch.cat(seen, dim=1))


class _Block(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.img_norm1, self.img_norm2 = (
            operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory) for _ in range(2)
        )
        self.attn = _Attention(width, operations, factory)
        self.img_mlp = _Mlp(width, operations, factory)

    def forward(self, x: Tensor, rows: Sequence[Tensor], layout: _Layout, cache: Any, options: Any) -> Tensor:
        """rows: scale and gate of attention and MLP, each [B + 1, D], the last one for text and references."""
        scale1, gate1, scale2, gate2 = rows
        attended = self.attn(layout.scaled(self.img_norm1(x), scale1), layout, cache, options)
        layout.add(x, attended, gate1)
        layout.add(x, self.img_mlp(layout.scaled(self.img_norm2(x), scale2)), gate2)
        return x


class _Layout:
    """Where text, references and image are in the sequence; `prefix` tokens are before the image."""

    def __init__(self, text: int, images: Sequence[tuple[int, int]], slots: Sequence[int]) -> None:
        bounds = [0, *slots, *[text] * (len(images) - 1 - len(slots)), text]
        positions, self.segments, self.prefix, place = [], [], 0, 0
        for begin, end, (height, width) in zip(bounds[:-1], bounds[1:], images, strict=True):
            if (count := end - begin) > 0:
                positions.append(torch.arange(place, place + count).unsqueeze(1).expand(count, 3))
                start = sum(len(p) for p in positions) - count
                causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
                self.segments.append((start, start + count, causal))
                place += count
            start = sum(len(p) for p in positions)
            rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
            positions.append(torch.cartesian_prod(torch.tensor([place]), rows, columns))
            self.segments.append((start, start + height * width, None))
            place, self.prefix = place + max(height, width), start
        self.bounds = bounds
        axes = (8, 12, 12)
        angles = [
            position[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
            for position, dim in zip(torch.cat(positions).float().unbind(1), axes, strict=True)
        ]
        self.turn = torch.polar(torch.tensor(1.0), torch.cat(angles, dim=1)[:, None])

    def turned(self, x: Tensor) -> Tensor:
        """RoPE on x [B, L, heads, head]."""
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * self.turn).flatten(3)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """x [B, L, D] * (1 + scale), the prefix by the last row of scale [B + 1, D]."""
        before, image = x[:, : self.prefix], x[:, self.prefix :]
        return torch.cat([before * (1 + scale[-1:, None]), image * (1 + scale[:-1, None])], dim=1)

    def add(self, x: Tensor, y: Tensor, gate: Tensor) -> None:
        """x += gate * y in place, on slices, as ComfyUI does."""
        x[:, self.prefix :].addcmul_(y[:, self.prefix :], gate[:-1, None])
        x[:, : self.prefix].addcmul_(y[:, : self.prefix], gate[-1:, None])


class _Last(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.linear = operations.Linear(width, width, bias=False, **factory)
        self.norm = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.linear(functional.silu(time)).unsqueeze(1))


class _TimeLayers(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(256, width, bias=False, **factory)
        self.linear_2 = operations.Linear(width, width, bias=False, **factory)


class _Time(nn.Module):
    def __init__(self, width: int, operations: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.timestep_embedder = _TimeLayers(width, operations, factory)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.timestep_embedder.linear_2(functional.silu(self.timestep_embedder.linear_1(waves)))


class Network(nn.Module):
    """With names, inputs and in-place operations of ComfyUI's QwenImage21Transformer2DModel."""

    def __init__(
        self, num_layers: int = 2, context_in_dim: int = TEXT_WIDTH, image_model: Any = None, dtype: Any = None,
        device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype = dtype
        width, factory = HEADS * HEAD, {"dtype": dtype, "device": device}
        self.time_text_embed = _Time(width, operations, factory)
        self.txt_in = _Text(context_in_dim, width, operations, factory)
        self.img_in = operations.Linear(64, width, bias=False, **factory)
        self.modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 4 * width, bias=False, **factory))
        self.transformer_blocks = nn.ModuleList([_Block(width, operations, factory) for _ in range(num_layers)])
        self.norm_out = _Last(width, operations, factory)
        self.proj_out = operations.Linear(width, 64, bias=False, **factory)
        self.prefix_cache: list[dict[str, Tensor]] | None = None
        self.prefix_cache_enabled = False

    def reset_prefix_cache(self, enabled: bool) -> None:
        self.prefix_cache, self.prefix_cache_enabled = None, enabled

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, ref_latents: Any = None, image_slots: Any = None,
        transformer_options: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        images = [*(ref_latents or ()), x]
        text = self.txt_in(context)
        layout = _Layout(text.shape[1], [image.shape[-2:] for image in images], image_slots or ())
        pieces = []
        for begin, end, image in zip(layout.bounds[:-1], layout.bounds[1:], images, strict=True):
            pieces += [text[:, begin:end], self.img_in(image.flatten(2).transpose(1, 2))]
        hidden = torch.cat(pieces, dim=1)
        time = self.time_text_embed(torch.cat([timestep, timestep.new_zeros(1)]))
        scale1, gate1, scale2, gate2 = self.modulation(time).chunk(4, dim=-1)
        rows = (scale1, gate1.tanh(), scale2, gate2.tanh())
        if self.prefix_cache_enabled and self.prefix_cache is None:
            self.prefix_cache = [{} for _ in self.transformer_blocks]
        caches = self.prefix_cache or [None] * len(self.transformer_blocks)
        for block, cache in zip(self.transformer_blocks, caches, strict=True):
            hidden = block(hidden, rows, layout, cache, transformer_options)
        out = self.proj_out(self.norm_out(hidden[:, layout.prefix :], time[:-1]))
        return out.transpose(1, 2).reshape(x.shape)


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
        system = [place for place, token in enumerate(first) if token == _START][1]  # no image is before it
        keep = torch.ones(out.shape[1], dtype=torch.bool)
        keep[:system] = False
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
        context_in_dim=sizes["context_in_dim"], axes_dims_rope=(8, 12, 12),
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
