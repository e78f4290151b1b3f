"""Distilled and undistilled checkpoints are distinguished where anything tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import ComfyUI


def made_of(family: str = "ZImage", allow_fp16: bool | None = None) -> Any:
    """A MODEL as far as the warning looks."""
    import comfy.supported_models

    kind = getattr(comfy.supported_models, family)
    config = kind.__new__(kind)
    config.unet_config = {} if allow_fp16 is None else {"allow_fp16": allow_fp16}
    return SimpleNamespace(model=SimpleNamespace(model_config=config))


DISTILLED = [
    ("z_image_turbo_bf16.safetensors", "ZImage"),
    ("z_image_turbo_int8_convrot.safetensors", "ZImage"),
    ("Z-Image-Turbo-fp8-e4m3fn.safetensors", "ZImage"),
    ("zImageTurbo_v10.safetensors", "ZImage"),
    ("z_image_turbo_based_on_photos.safetensors", "ZImage"),
    ("z-image-turbo-UD-Q4_K_XL.gguf", "ZImage"),
    ("flux-2-klein-4b-Q8_0.gguf", "Flux2"),
    ("flux-2-klein-4b.safetensors", "Flux2"),
    ("flux-2-klein-9b-fp8.safetensors", "Flux2"),
    ("krea2_turbo_fp8_scaled.safetensors", "Krea2"),
    ("Krea-2-Turbo-bf16.safetensors", "Krea2"),
    ("krea2_drawn_in_crawl.safetensors", "Krea2"),
    ("my_finetune.safetensors", "ZImage"),
    ("database_style.safetensors", "ZImage"),
    ("", "ZImage"),
]
UNDISTILLED = [
    ("z_image_bf16.safetensors", "ZImage"),
    ("z_image_fp8_e4m3fn.safetensors", "ZImage"),
    ("Z-Image.safetensors", "ZImage"),
    ("z-image-Q8_0.gguf", "ZImage"),
    ("z-image-UD-Q4_K_XL.gguf", "ZImage"),
    ("z_image-IQ4_XS.gguf", "ZImage"),
    ("z-image-F16.gguf", "ZImage"),
    ("flux-2-klein-base-4b-Q5_K_M.gguf", "Flux2"),
    ("z_image_base_bf16.safetensors", "ZImage"),
    ("z_image_de_turbo_v1_bf16.safetensors", "ZImage"),
    ("Z-Image-De-Turbo.safetensors", "ZImage"),
    ("flux-2-klein-base-4b.safetensors", "Flux2"),
    ("flux-2-klein-base-9b-fp8.safetensors", "Flux2"),
    ("krea2_raw_bf16.safetensors", "Krea2"),
    ("Krea-2-Raw.safetensors", "Krea2"),
    ("krea2_raw_int8_convrot.safetensors", "Krea2"),
]


@pytest.mark.parametrize(("name", "family"), DISTILLED)
def test_distilled_or_unknown_names_pass(comfyui: ComfyUI, name: str, family: str) -> None:
    assert comfyui.module("nodes.comfy_host.distilled").warn_if_undistilled(made_of(family), name) is None


@pytest.mark.parametrize(("name", "family"), UNDISTILLED)
def test_undistilled_names_are_warned_of(comfyui: ComfyUI, name: str, family: str) -> None:
    warning = comfyui.module("nodes.comfy_host.distilled").warn_if_undistilled(made_of(family), name)
    assert warning and warning.startswith(name) and "by its name" in warning and "\n" not in warning
    right = {"ZImage": "z_image_turbo_bf16", "Flux2": "flux-2-klein-4b", "Krea2": "krea2_turbo_fp8_scaled"}
    assert right[family] in warning


def test_the_weights_tell_where_the_name_does_not(comfyui: ComfyUI) -> None:
    warn = comfyui.module("nodes.comfy_host.distilled").warn_if_undistilled
    assert "by its weights" in warn(made_of(allow_fp16=False), "my_finetune.safetensors")
    assert warn(made_of(allow_fp16=False), "").startswith("this model looks like")
    assert warn(made_of(allow_fp16=True), "my_finetune.safetensors") is None
    assert warn(made_of(allow_fp16=False), "z_image_turbo_bf16.safetensors") is None  # its maker should know
    assert warn(made_of("Flux2", allow_fp16=False), "my_finetune.safetensors") is None


@pytest.mark.parametrize(("spread", "small"), [(0.3, True), (0.6, False)])
def test_comfyui_still_leaves_that_mark(comfyui: ComfyUI, spread: float, small: bool) -> None:
    import comfy.model_detection
    from comfy.utils import z_image_to_diffusers
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    with torch.device("meta"):
        network = ZImageTransformer2DModel()
    table = z_image_to_diffusers({"n_layers": 30, "dim": 3840})
    names = {key: target if isinstance(target, str) else target[0] for key, target in table.items()}
    state = {names[key]: value for key, value in network.state_dict().items()}
    state["layers.28.ffn_norm1.weight"] = 1 + spread * torch.tensor([-1.0, 1.0]).repeat(1920)
    config = comfy.model_detection.model_config_from_unet(state, "")
    assert config.unet_config["allow_fp16"] is small


def test_the_demo_model_is_distilled(comfyui: ComfyUI) -> None:
    model = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    name = comfyui.module("nodes.comfy_host.base_name").base_name(model)
    assert comfyui.module("nodes.comfy_host.distilled").warn_if_undistilled(model, name) is None
