"""Files of random weights with the names, layouts, shapes and dtypes of the published ones, for ComfyUI's own loader nodes.

Z-Image-Turbo's take 26 GB. They say nothing about images; time, memory and every conversion are as with the real ones.
"""  # noqa: E501

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import networks

State = dict[str, Tensor]
_META = torch.device("meta")


def z_image() -> nn.Module:
    """Z-Image-Turbo's transformer, without values."""
    return networks.build(networks.z_image(), _META).model.diffusion_model


def qwen3() -> nn.Module:
    """Qwen3-4B, which was trained without a head of its own; without values."""
    llama = importlib.import_module("comfy.text_encoders.llama")
    return llama.Qwen3_4B({}, torch.bfloat16, _META, importlib.import_module("comfy.ops").manual_cast)


def qwen3vl() -> nn.Module:
    """Qwen3-VL-4B: the language model and the vision encoder, without values."""
    source = importlib.import_module("comfy.text_encoders.qwen3vl")
    ops = importlib.import_module("comfy.ops").manual_cast
    config = {**source.QWEN3VL_VISION_COMMON, **source.QWEN3VL_VISION["qwen3vl_4b"], "out_hidden_size": 2560}
    model = nn.Module()
    model.model = nn.Module()
    model.model.language_model = qwen3().model
    model.model.visual = source.Qwen3VLVisionModel(config, device=_META, dtype=torch.bfloat16, ops=ops)
    return model


def autoencoder() -> nn.Module:
    """FLUX.1's autoencoder, without values."""
    sizes = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    source, place = importlib.import_module("comfy.ldm.models.autoencoder"), "comfy.ldm.modules.diffusionmodules.model"
    with _META:
        return source.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{place}.Encoder", "params": sizes},
            decoder_config={"target": f"{place}.Decoder", "params": sizes},
        )


FILES: Mapping[str, tuple[Callable[[], nn.Module], bool]] = {
    "diffusion_models/z_image_turbo_bf16": (z_image, False),
    "text_encoders/qwen_3_4b": (qwen3, False),
    "text_encoders/qwen3vl_4b_fp8_scaled": (qwen3vl, True),
    "vae/ae": (autoencoder, False),
}
"""Below ComfyUI's `models`, without the ending: what is in it, and whether its matrices are in fp8."""


def random_state(module: nn.Module, device: torch.device) -> State:
    """Random values in bf16 that keep activations near 1: matrices by their inputs, norms 1, biases 0.

    Args:
        module: on the meta device.
        device: draws them, where that is fast; they come back in RAM.
    """
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, value in module.state_dict().items():
        if value.ndim >= 2:
            drawn = torch.randn(value.shape, device=device, generator=generator)
            drawn *= value[0].numel() ** -0.5
        else:
            drawn = torch.full(value.shape, float(not name.endswith("bias")), device=device)
        state[name] = drawn.bfloat16().cpu()
    return state


def write(models: Path, device: torch.device) -> int:
    """Writes what is missing of `FILES` and returns the bytes of all.

    Args:
        models: ComfyUI's folder of models.
        device: draws the values.
    """
    from safetensors.torch import save_file
    from stock_files import fp8_in_header  # of tests/comfyui

    size = 0
    for name, (make, is_fp8) in FILES.items():
        path = models / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            state = random_state(make(), device)
            tensors, header = fp8_in_header(state) if is_fp8 else (state, {})
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=header)
        size += path.stat().st_size
    return size
