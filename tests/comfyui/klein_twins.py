"""One small random FLUX.2-klein twice: ComfyUI's MODEL, and diffusers' network with the same weights.

Import only after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import toy
from torch import Tensor

HEADS, AXES = 2, (8, 12, 12, 16)
WIDTH = HEADS * sum(AXES)
"""Axes of unequal width, so that one taken for another shows."""


def model(text_width: int = 96, double: int = 2, single: int = 2, seed: int = 0) -> Any:
    """A MODEL the way a loader node leaves one: its weights are inference tensors."""
    with torch.inference_mode():
        return toy.flux2(
            seed, hidden_size=WIDTH, num_heads=HEADS, axes_dim=list(AXES), context_in_dim=text_width, depth=double,
            depth_single_blocks=single,
        )  # fmt: skip


def diffusers_klein(model: Any) -> Any:
    """diffusers' Flux2Transformer2DModel with the MODEL's weights; diffusers' own table translates their names."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as converted
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    sizes = model.model.model_config.unet_config
    network = Flux2Transformer2DModel(
        num_layers=sizes["depth"], num_single_layers=sizes["depth_single_blocks"],
        num_attention_heads=sizes["num_heads"], attention_head_dim=sizes["hidden_size"] // sizes["num_heads"],
        joint_attention_dim=sizes["context_in_dim"], axes_dims_rope=tuple(sizes["axes_dim"]), guidance_embeds=False,
    )  # fmt: skip
    network.load_state_dict(converted(dict(model.model.diffusion_model.state_dict())), strict=True)
    return network.eval().requires_grad_(False)


def velocity(
    network: Any, x: Tensor, sigma: float, features: Sequence[Tensor], references: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """noise - x0 [B, 128, h, w] by diffusers' network, one sample after the other.

    features: B of [L, D]. references: of each sample the latents [128, h, w], or () for none. The tokens, their order
    and their positions are made by the pipeline's own methods.
    """
    samples = zip(x.split(1), features, references or [()] * len(x), strict=True)
    return torch.cat([_velocity(network, *sample, sigma) for sample in samples])


def _velocity(network: Any, x: Tensor, features: Tensor, references: Sequence[Tensor], sigma: float) -> Tensor:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline as Pipeline

    texts = features[None]
    tokens, ids = Pipeline._pack_latents(x), Pipeline._prepare_latent_ids(x)
    seen, all_ids = [latent[None] for latent in references], ids
    if seen:
        tokens = torch.cat([tokens, *map(Pipeline._pack_latents, seen)], dim=1)
        all_ids = torch.cat([ids, Pipeline._prepare_image_ids(seen)], dim=1)
    text_ids = Pipeline._prepare_text_ids(texts)
    out = network(tokens, texts, torch.tensor([sigma]), all_ids, text_ids, return_dict=False)[0]
    unpacked: Any = Pipeline._unpack_latents_with_ids(out[:, : ids.shape[1]], ids)
    return unpacked


# -- VAE, text encoder, pipeline ---------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 28, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
"""A text encoder of as many layers as klein reads from; its features are three times as wide."""
CHAT = (
    "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n{{ '<think>\\n\\n</think>\\n\\n' }}"
)
"""What Qwen3's chat template makes of one message without thinking."""


def vaes(seed: int = 4) -> tuple[Any, Any]:
    """(ComfyUI's VAE, diffusers' AutoencoderKLFlux2) of 128 channels; ComfyUI translates the names itself."""
    import comfy.sd
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    theirs = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    toy.fill(theirs, seed)
    generator = torch.Generator().manual_seed(seed)
    bn: Any = theirs.bn
    bn.running_mean.normal_(0, 0.3, generator=generator)
    bn.running_var.uniform_(0.5, 2.0, generator=generator)
    shape = {
        "double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "batch_norm_latent": True,
    }  # fmt: skip
    with torch.inference_mode():
        config = {"params": {"ddconfig": shape, "embed_dim": 32}}
        ours = comfy.sd.VAE(sd=dict(theirs.state_dict()), config=config, dtype=torch.float32)
    ours.downscale_ratio = ours.upscale_ratio = 16  # as ComfyUI finds for itself in the full-sized file
    ours.latent_channels = 128
    return ours, theirs.eval().requires_grad_(False)


def clips(seed: int = 1, name: str = "qwen3_4b") -> tuple[Any, Any, Any]:
    """(ComfyUI's CLIP, transformers' Qwen3 with its weights, a tokenizer with klein's template).

    name: "qwen3_4b", or "qwen3_8b" for the text encoder of klein 9B.
    """
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import flux
    from transformers import Qwen3Config, Qwen3Model

    with torch.inference_mode(), toy.allocated():
        kind = flux.KleinTokenizer8B if name == "qwen3_8b" else flux.KleinTokenizer
        target = ClipTarget(kind, flux.klein_te(model_type=name))
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, f"{name}_model_config": TEXT})
        toy.fill(clip.cond_stage_model, seed)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    shape: dict[str, Any] = {**TEXT, "vocab_size": 151936, "head_dim": 128}
    encoder = Qwen3Model(Qwen3Config(**shape, rope_parameters=rope))
    weights = getattr(clip.cond_stage_model, name).transformer.model.state_dict()
    encoder.load_state_dict({key: value for key, value in weights.items() if key != "lm_head.weight"})
    tokenizer = getattr(clip.tokenizer, name).tokenizer
    tokenizer.chat_template = CHAT  # ComfyUI never reads it
    return clip, encoder.eval().requires_grad_(False), tokenizer


def pipeline(network: Any, vae: Any, encoder: Any = None, tokenizer: Any = None) -> Any:
    """diffusers' Flux2KleinPipeline, its scheduler configured as in klein's repositories."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, time_shift_type="exponential")
    pipe = Flux2KleinPipeline(scheduler, vae, encoder, tokenizer, network, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_model_space(pipe: Any, latents: Tensor) -> Tensor:
    """The pipeline's latents [B, 32, H / 8, W / 8] as the network has them, [B, 128, H / 16, W / 16]."""
    bn = pipe.vae.bn
    std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    return (pipe._patchify_latents(latents) - bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
