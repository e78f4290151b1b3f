"""Small random models through ComfyUI's own classes; import only after the `comfyui` fixture has booted it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded values for every parameter: ComfyUI leaves them uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel())
            else:
                around_1 = "norm" in name and not name.endswith(".scale")  # Krea 2's norms add 1 to their scale
                values = torch.rand(parameter.shape, generator=generator) * 0.4 + (0.8 if around_1 else -0.2)
            parameter.copy_(values.to(parameter.dtype))
    return module


@contextmanager
def allocated() -> Iterator[None]:
    """Inside, ComfyUI's layers have weights from the start; under dynamic VRAM they may have none before a load."""
    import comfy.memory_management

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", False)
        yield


def network(config: Any, **options: Any) -> Any:
    """ComfyUI's model of this configuration, whose weights nothing has loaded; options: of `get_model`."""
    with allocated():
        return config.get_model({}, "", **options)


def z_image(dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, seed: int = 0) -> Any:
    """A Z-Image of 2 layers and text width 64 as a MODEL; weights in `dtype`, computed in `compute`."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 64, "n_layers": 2,
            "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "multiple_of": 32,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        }
    )  # fmt: skip
    config.set_inference_dtype(dtype, compute)
    model = network(config)
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def flux2(seed: int = 0, **sizes: Any) -> Any:
    """A FLUX.2-klein of one double-stream and two single-stream blocks and text width 192 as a MODEL, fp32.

    sizes: entries of ComfyUI's configuration to have otherwise.
    """
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Flux2(
        {
            "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": 1, "mlp_ratio": 3.0, "theta": 2000,
            "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
            "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "in_channels": 128,
            "hidden_size": 128, "context_in_dim": 192, "patch_size": 1, "vec_in_dim": None, "depth": 1,
            "depth_single_blocks": 2, "guidance_embed": False, "yak_mlp": False, "txt_norm": False, **sizes,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = network(config)
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def real_z_image(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Z-Image at its real size and without weights, for what follows from shapes alone."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560,
            "n_layers": 30, "n_refiner_layers": 2, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30,
            "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    )  # fmt: skip
    config.set_inference_dtype(dtype, None if dtype == torch.bfloat16 else torch.bfloat16)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(
        network(config, device=torch.device("meta")), load_device=cpu, offload_device=cpu
    )
