"""Z-Image-Turbo at its real size, without its weights: what gets a LoRA, and how large that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inprocess import ComfyUI

RANK = 64
MODULES, PARAMETERS = 238, 158_760_960
"""7 in each of 34 blocks; r * (in + out) summed: 0.64 GB in fp32, a file of 318 MB in bf16."""


@pytest.fixture(scope="module")
def theirs() -> Any:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    with torch.device("meta"):
        return ZImageTransformer2DModel()


@pytest.fixture(scope="module")
def denoiser(comfyui: ComfyUI, theirs: Any) -> Any:
    """ComfyUI's network as its own detection configures it from the shapes of a checkpoint."""
    import comfy.model_detection
    import comfy.model_patcher
    from comfy.utils import z_image_to_diffusers

    table = z_image_to_diffusers({"n_layers": 30, "dim": 3840})
    shapes: dict[str, list[int]] = {}
    for name, value in theirs.state_dict().items():
        target = table[name] if isinstance(table[name], str) else table[name][0]
        shape = list(value.shape)
        if target in shapes:
            shape[0] += shapes[target][0]
        shapes[target] = shape
    state = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(state, "")
    config.set_inference_dtype(torch.bfloat16, None)
    meta = torch.device("meta")
    with torch.inference_mode(), meta:
        model = config.get_model({}, "", device=meta)
    network = {name: tuple(value.shape) for name, value in model.diffusion_model.state_dict().items()}
    assert network == {name: tuple(shape) for name, shape in shapes.items()}
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=meta, offload_device=meta)
    return comfyui.module("nodes.host").ComfyDenoiser(patcher)


def adapters(comfyui: ComfyUI, denoiser: Any, config: Any) -> Any:
    return comfyui.core("adapters").AdapterSet(denoiser.sites(), config, device="meta", teacher="frozen")


def test_the_authors_targets(comfyui: ComfyUI, denoiser: Any, theirs: Any) -> None:
    """q, k, v, out, w1, w2, w3 of all blocks, refiners included, each with an A of its own; peft counts the same."""
    from peft import LoraConfig, inject_adapter_in_model

    ours = adapters(comfyui, denoiser, denoiser.family.lora_config())
    assert (ours.config.rank, ours.config.alpha) == (RANK, 128.0)
    wanted = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
    inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=wanted), theirs, low_cpu_mem_usage=True
    )
    injected = {n.replace(".default.", "."): p for n, p in theirs.named_parameters() if ".lora_" in n}
    shapes = {name: tuple(value.shape) for name, value in ours._views("student").items()}
    assert shapes == {name: tuple(value.shape) for name, value in injected.items()}
    assert len(ours.part_names()) == MODULES and len(shapes) == 2 * MODULES
    assert sum(parameter.numel() for parameter in ours.parameters()) == PARAMETERS


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("layers.*.attention.*", "layers.*.feed_forward.*"), 30 * 7),
        (("layers.*.attention.*",), 30 * 4),
        (("re:layers\\.(1\\d|2[0-4])\\.(attention|feed_forward)\\..*",), 15 * 7),
        (("noise_refiner.*.attention.*", "context_refiner.*.attention.*"), 4 * 4),
    ],
    ids=["no refiners", "attention", "blocks 10 to 24", "refiners"],
)
def test_patterns_choose_blocks(comfyui: ComfyUI, denoiser: Any, targets: tuple[str, ...], count: int) -> None:
    names = [part.name for site in denoiser.sites() for part in site.parts]
    assert len(comfyui.core("lora_config").match_targets(names, targets)) == count
