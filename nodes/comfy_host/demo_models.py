"""The demo model as ComfyUI objects: MODEL, CLIP, VAE and vision tower, from the weights in the repository.

They are ComfyUI's own classes at the demo's sizes, which its loaders do not recognise, so every stock node works with
them. All compute in fp32, as the standalone host does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.text_encoders.z_image
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import llama
from torch import Tensor, nn

from ...dopsd_core.demo import model_files as demo
from ...dopsd_core.demo.settings import SAMPLE_STEPS
from .denoiser import STEPS_OPTION
from .vision import TeacherVision, VisionSpec, new_vision

DTYPE = torch.float32
VOCABULARY = 151936  # the real tokenizer's; words outside the demo captions have zero embeddings


# -- MODEL ------------------------------------------------------------------------------------------------------------


def load_model() -> comfy.model_patcher.ModelPatcher:
    """The distilled transformer as MODEL, with the number of steps that it was distilled for."""
    patcher = _model_patcher(str(demo.WEIGHTS / demo.MODEL_FILE))
    patcher.model_options[STEPS_OPTION] = SAMPLE_STEPS
    return patcher


def _model_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    config = comfy.supported_models.ZImage(
        {
            **demo.TRANSFORMER_SIZES,
            "image_model": "lumina2",
            "patch_size": 2,
            "qk_norm": True,
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "multiple_of": 2,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    )
    config.custom_operations = operations = comfy.ops.disable_weight_init
    config.set_inference_dtype(DTYPE, None)
    model = config.get_model({}, "")
    network = model.diffusion_model
    # ComfyUI sizes the hidden layer by the width, up to 1024; the full model and the demo have 1024
    network.t_embedder = type(network.t_embedder)(1024, output_size=256, dtype=DTYPE, operations=operations)
    comfy.model_management.archive_model_dtypes(network)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())
    model.load_model_weights(demo.read_weights(Path(path)), "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (_model_patcher, (path,))  # ComfyUI makes deep copies of a MODEL with it
    return patcher


# -- CLIP and the teacher's vision ------------------------------------------------------------------------------------


class DemoConfig(llama.Qwen3VL_4BConfig):
    """Qwen3-VL's configuration with the demo's head size."""

    head_dim = demo.HEAD_DIM
    rope_dims = demo.ROPE_SECTION


def language_config(sizes: dict[str, Any]) -> DemoConfig:
    """The configuration of the demo's language model; `sizes` as in its weight file's header."""
    return DemoConfig(**sizes, vocab_size=VOCABULARY, rope_theta=demo.ROPE_THETA)


class DemoLanguageModel(llama.Qwen3_4B):
    """Qwen3 with the demo's head size, which is not a field of ComfyUI's config."""

    def __init__(self, config_dict: dict[str, Any], dtype: torch.dtype, device: Any, operations: Any) -> None:
        nn.Module.__init__(self)
        config = language_config({**demo.TEXT_SIZES, **config_dict})
        self.num_layers = config.num_hidden_layers
        self.model = llama.Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


class DemoTextModel(sd1_clip.SDClipModel):
    """Z-Image's text encoder around the demo's language model: hidden layer -2, no final norm."""

    def __init__(self, device: Any, dtype: torch.dtype, model_options: dict[str, Any]) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options,
            model_class=DemoLanguageModel,
            textmodel_json_config={},
            layer="hidden",
            layer_idx=-2,
            layer_norm_hidden_state=False,
            special_tokens={"pad": 151643},
            enable_attention_masks=True,
            return_attention_masks=True,
        )


def load_clip(disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The text encoder as CLIP, with ComfyUI's tokenizer and outer class for Z-Image."""
    state = demo.read_weights(demo.WEIGHTS / demo.TEXT_ENCODER_FILE)
    rows = state["model.language_model.embed_tokens.weight"]
    language = _part(state, "model.language_model.", "model.")
    language["model.embed_tokens.weight"] = rows.new_zeros(VOCABULARY, rows.shape[1]).index_copy(
        0, state[demo.TOKEN_IDS].long(), rows
    )
    target = ClipTarget(comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.te())
    options = {"dtype": DTYPE, "qwen3_4b_class": DemoTextModel}
    clip = comfy.sd.CLIP(target, model_options=options, state_dict=[language], disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init = (_clip_patcher, ())
    return clip


def _clip_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(disable_dynamic).patcher


def load_vision() -> TeacherVision:
    """The vision tower from the same file."""
    tower, pixels = {**demo.VISION_SIZES, "in_channels": 3}, demo.VISION_PIXELS
    spec = VisionSpec("the demo's encoder", tower, language_config(demo.TEXT_SIZES), pixels, pixels)
    state = _part(demo.read_weights(demo.WEIGHTS / demo.TEXT_ENCODER_FILE), "model.visual.", "")
    return new_vision(state, spec, comfy.ops.manual_cast, DTYPE)


def _part(state: dict[str, Tensor], prefix: str, new_prefix: str) -> dict[str, Tensor]:
    return {new_prefix + k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}


# -- VAE --------------------------------------------------------------------------------------------------------------


class DemoLatents(nn.Module):
    """The demo's autoencoder, whose N(0, 1) latents get the scale and shift that ComfyUI removes from Z-Image's."""

    def __init__(self) -> None:
        super().__init__()
        conv = comfy.ops.disable_weight_init.Conv2d  # plain ones stay where they are when ComfyUI keeps weights in RAM
        self.network = demo.load_vae(demo.WEIGHTS / demo.VAE_FILE, conv).requires_grad_(False)
        self._format = comfy.latent_formats.Flux()

    def encode(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] in [-1, 1] -> latent [B, 16, H / 8, W / 8]."""
        return self._format.process_out(self.network.encode(image))

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, 16, h, w] -> image [B, 3, 8 h, 8 w] in [-1, 1]."""
        return self.network.decode(self._format.process_in(latent))


def load_vae() -> comfy.sd.VAE:
    """The autoencoder as VAE.

    `comfy.sd.VAE` only builds networks whose tensor names it recognises. So it gets a small one of the same geometry
    (TAESD: 16 channels, 8 pixels per latent), sets its attributes for that one, and then the network is replaced.
    """
    stand_in = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
    vae = comfy.sd.VAE(sd=stand_in, dtype=DTYPE)
    vae.first_stage_model = DemoLatents().eval()
    comfy.model_management.archive_model_dtypes(vae.first_stage_model)
    vae.patcher = comfy.model_patcher.CoreModelPatcher(
        vae.first_stage_model, vae.device, comfy.model_management.vae_offload_device()
    )
    vae.patcher.cached_patcher_init = (_vae_patcher, ())
    vae.size = comfy.model_management.module_size(vae.first_stage_model)
    return vae


def _vae_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_vae().patcher  # like ComfyUI's own factory for a VAE, which ignores the flag too
