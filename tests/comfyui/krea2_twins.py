"""One small random Krea 2 twice: ComfyUI's MODEL, CLIP and VAE, and diffusers' pipeline with the same weights.

Import only after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import towers
import toy
from torch import Tensor

TEXT_WIDTH, TEXT_LAYERS = 128, 12
LANGUAGE = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 36,
}  # fmt: skip
"""As many layers as the real text encoder has: the features come from the 2nd to the 35th."""
TAPS = tuple(range(2, 36, 3))
SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n"
)


def model(blocks: int = 2, heads: int = 2, kv_heads: int = 1, seed: int = 0, text_width: int = TEXT_WIDTH) -> Any:
    """A MODEL the way a loader node leaves one: its weights are inference tensors.

    Heads are 128 wide, as ComfyUI's detection assumes; the heads of the text fusion share the text width.
    """
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Krea2(
        {
            "image_model": "krea2", "features": 128 * heads, "heads": heads, "kvheads": kv_heads, "layers": blocks,
            "txtdim": text_width, "txtlayers": TEXT_LAYERS, "txtheads": 4, "txtkvheads": 4, "patch": 2, "channels": 16,
            "multiplier": 4,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = toy.network(config)
        toy.fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def diffusers_krea2(model: Any) -> Any:
    """diffusers' Krea2Transformer2DModel with the MODEL's weights; diffusers' own table translates their names."""
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers as converted
    from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel

    sizes, own = model.model.model_config.unet_config, model.model.diffusion_model
    network = Krea2Transformer2DModel(
        num_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kvheads"],
        intermediate_size=own.blocks[0].mlp.gate.out_features, text_hidden_dim=sizes["txtdim"],
        num_text_layers=sizes["txtlayers"], text_num_attention_heads=sizes["txtheads"],
        text_num_key_value_heads=sizes["txtkvheads"],
        text_intermediate_size=own.txtfusion.refiner_blocks[0].mlp.gate.out_features,
    )  # fmt: skip
    network.load_state_dict(converted(dict(own.state_dict())), strict=True)
    return network.eval().requires_grad_(False)


def velocity(network: Any, x: Tensor, sigma: float, features: Sequence[Tensor]) -> Tensor:
    """noise - x0 [B, 16, h, w] by diffusers' network, one sample after the other; features: B of [L, 12 * D]."""
    return torch.cat([_velocity(network, *sample, sigma) for sample in zip(x.split(1), features, strict=True)])


def _velocity(network: Any, x: Tensor, features: Tensor, sigma: float) -> Tensor:
    from diffusers.pipelines.krea2.pipeline_krea2 import Krea2Pipeline

    pipe: Any = SimpleNamespace(patch_size=2, vae_scale_factor=8)
    height, width = x.shape[-2:]
    text = features.unflatten(-1, (TEXT_LAYERS, -1))[None]
    out = network(
        hidden_states=Krea2Pipeline._pack_latents(pipe, x, 1, 16, height, width),
        encoder_hidden_states=text,
        timestep=torch.tensor([sigma]),
        position_ids=Krea2Pipeline.prepare_position_ids(len(features), height // 2, width // 2, x.device),
        return_dict=False,
    )[0]
    return Krea2Pipeline._unpack_latents(pipe, out, 8 * height, 8 * width).squeeze(2)


# -- VAE, text encoder, pipeline ---------------------------------------------------------------------------------------


def vaes(seed: int = 4) -> tuple[Any, Any]:
    """(ComfyUI's VAE, diffusers' AutoencoderKLQwenImage); diffusers translates the names itself."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers as converted
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    original = WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    state = toy.fill(original, seed).state_dict()
    with torch.inference_mode():
        ours = comfy.sd.VAE(sd=dict(state), dtype=torch.float32)
    theirs = AutoencoderKLQwenImage(base_dim=8)
    theirs.load_state_dict(converted(dict(state)), strict=True)
    return ours, theirs.eval().requires_grad_(False)


@contextmanager
def small_tower() -> Iterator[None]:
    """Inside, ComfyUI builds Qwen3-VL-4B with a small vision tower; its size is not read from the file."""
    from comfy.text_encoders import qwen3vl

    with pytest.MonkeyPatch.context() as patch:
        tower = {name: value for name, value in towers.TOWER.items() if name != "out_hidden_size"}
        patch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", tower)
        yield


def clips(seed: int = 1) -> tuple[Any, Any]:
    """(ComfyUI's CLIP with its vision tower, transformers' Qwen3-VL with its weights)."""
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import krea2

    with torch.inference_mode(), toy.allocated(), small_tower():
        target = ClipTarget(krea2.Krea2Tokenizer, krea2.te())
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "qwen3vl_4b_model_config": LANGUAGE})
        toy.fill(clip.cond_stage_model, seed)
    return clip, qwen3vl(clip)


def qwen3vl(clip: Any) -> Any:
    """transformers' Qwen3VLModel with the weights of the CLIP."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    own = clip.cond_stage_model.qwen3vl_4b.transformer
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    sizes: dict[str, Any] = {**LANGUAGE, "vocab_size": 151936, "head_dim": 128, "rope_parameters": rope}
    tower = {**towers.TOWER, "out_hidden_size": TEXT_WIDTH, "patch_size": 16, "spatial_merge_size": 2}
    whole = Qwen3VLModel(Qwen3VLConfig(text_config=sizes, vision_config=tower)).eval()
    whole.visual.load_state_dict(own.visual.state_dict())
    whole.language_model.load_state_dict(own.model.state_dict())
    return whole.requires_grad_(False)


def pipeline(network: Any, vae: Any, encoder: Any = None, tokenizer: Any = None) -> Any:
    """diffusers' Krea2Pipeline of the distilled checkpoint, its scheduler configured as in Krea 2's repositories."""
    from diffusers.pipelines.krea2.pipeline_krea2 import Krea2Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
    )
    pipe = Krea2Pipeline(scheduler, vae, encoder, tokenizer, network, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(clip: Any) -> Any:
    """Qwen's tokenizer, which pads on the right as the pipeline expects."""
    return clip.tokenizer.qwen3vl_4b.tokenizer


def text_features(pipe: Any, text: str) -> Tensor:
    """The pipeline's features [L, 12 * D] of a text, without the padding in the middle that its mask excludes."""
    with torch.no_grad():
        hidden, mask = pipe.encode_prompt(text)
    return hidden[0][mask[0]].flatten(1)


def seen_features(encoder: Any, clip: Any, text: str, image: Tensor) -> Tensor:
    """transformers' features [L, 12 * D] of image [3, H, W] in [0, 1] and text in Krea 2's template.

    A hidden state is what a layer reads, in which the first three layers include the tower's DeepStack features.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=512**2, max_pixels=768**2
    )
    seen = processor(images=image, do_rescale=False, do_convert_rgb=False, return_tensors="pt")
    marks = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
    prompt = f"{SYSTEM}<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(clip)(prompt, return_tensors="pt")["input_ids"]
    states: list[Tensor] = []
    layers = [encoder.language_model.layers[number] for number in TAPS]
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0])) for layer in layers]
    with torch.no_grad():
        encoder(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == 151655).long(),
            **seen,
        )
    for hook in hooks:
        hook.remove()
    return torch.cat(states, dim=-1)[len(tokenizer(clip)(SYSTEM)["input_ids"]) + 3 :]


def latent_of(vae: Any, image: Tensor) -> Tensor:
    """diffusers' latent [16, h, w] of image [3, H, W] in [0, 1], in the network's space."""
    config = vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        latent = vae.encode((image * 2 - 1)[None, :, None]).latent_dist.mode()[0, :, 0]
    return (latent - mean) / std
