"""One small random Krea 2 twice: ComfyUI's MODEL, CLIP and VAE, and diffusers' pipeline with the same weights.

Import only after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

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
