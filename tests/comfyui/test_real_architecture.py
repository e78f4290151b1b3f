"""The models at their real sizes, without their weights: what gets a LoRA, and how large that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import toy
from inprocess import ComfyUI

RANK = 64


@dataclass(frozen=True)
class Real:
    """A model's sizes in diffusers' configuration ({} where they are the class's defaults), the modules that get a LoRA
    (a regular expression for peft), their number, and the parameters of that LoRA, rank * (in + out) summed.
    chosen: how many modules other patterns choose."""

    sizes: Mapping[str, Any]
    wanted: str
    modules: int
    parameters: int
    chosen: Mapping[tuple[str, ...], int]


OF_Z_IMAGE = r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
OF_KLEIN = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
OF_KREA2 = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))"
MODELS = {
    "z_image": Real(
        {}, OF_Z_IMAGE, 34 * 7, 158_760_960,
        {
            ("layers.*.attention.*", "layers.*.feed_forward.*"): 30 * 7,
            ("layers.*.attention.*",): 30 * 4,
            (r"re:layers\.(1\d|2[0-4])\.(attention|feed_forward)\..*",): 15 * 7,
            ("noise_refiner.*.attention.*", "context_refiner.*.attention.*"): 4 * 4,
        },
    ),
    "klein_4b": Real(
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        OF_KLEIN, 5 * 12 + 20 * 2, 96_337_920,
        {
            ("transformer_blocks.*.attn.*",): 5 * 8,  # what the reference scripts train
            ("transformer_blocks.*",): 5 * 12,
            ("single_transformer_blocks.*",): 20 * 2,
            (r"re:single_transformer_blocks\.1\d\..*", "ff.linear_in"): 10 * 2 + 5,
        },
    ),
    "klein_9b": Real(
        {
            "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        OF_KLEIN, 8 * 12 + 24 * 2, 174_063_616,
        {("transformer_blocks.*.attn.*",): 8 * 8, ("single_transformer_blocks.*",): 24 * 2},
    ),
    "krea2": Real(
        {}, OF_KREA2, 28 * 8, 214_695_936,
        {
            ("text_fusion.*_blocks.*",): 4 * 8,
            ("text_fusion.refiner_blocks.*.attn.*",): 2 * 5,
            ("transformer_blocks.*.attn.*",): 28 * 5,
            ("attn.to_q",): 28 + 4,
        },
    ),
}  # fmt: skip
"""In fp32 0.64, 0.39, 0.70 and 0.86 GB; files of 318, 193, 348 and 429 MB in bf16."""


def diffusers_network(name: str) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    kinds = {"z_image": ZImageTransformer2DModel, "krea2": Krea2Transformer2DModel}
    kind = kinds.get(name, Flux2Transformer2DModel)
    with torch.device("meta"):
        return kind(**MODELS[name].sizes)


def z_image_shapes(theirs: Any) -> dict[str, list[int]]:
    """The tensors of a checkpoint in ComfyUI's form, by ComfyUI's own table."""
    from comfy.utils import z_image_to_diffusers

    table = z_image_to_diffusers({"n_layers": 30, "dim": 3840})
    shapes: dict[str, list[int]] = {}
    for name, value in theirs.state_dict().items():
        target = table[name] if isinstance(table[name], str) else table[name][0]
        shape = list(value.shape)
        if target in shapes:
            shape[0] += shapes[target][0]
        shapes[target] = shape
    return shapes


def klein_shapes(theirs: Any) -> dict[str, list[int]]:
    """The same of FLUX.2-klein: what diffusers' own conversion of checkpoints makes into its network."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as converted

    sizes = theirs.config
    network = Flux(
        "flux2", hidden_size=sizes.num_attention_heads * 128, num_heads=sizes.num_attention_heads,
        context_in_dim=sizes.joint_attention_dim, depth=sizes.num_layers, depth_single_blocks=sizes.num_single_layers,
        axes_dim=[32, 32, 32, 32], mlp_ratio=3.0, theta=2000, in_channels=128, out_channels=128, patch_size=1,
        vec_in_dim=None, qkv_bias=False, guidance_embed=False, txt_ids_dims=[3], global_modulation=True,
        mlp_silu_act=True, ops_bias=False, operations=disable_weight_init, device=torch.device("meta"),
    )  # fmt: skip
    state = network.state_dict()
    diffusers = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in converted(dict(state)).items()} == diffusers
    return {name: list(value.shape) for name, value in state.items()}


def krea2_shapes(theirs: Any) -> dict[str, list[int]]:
    """The same of Krea 2."""
    from comfy.ldm.krea2.model import SingleStreamDiT
    from comfy.ops import disable_weight_init
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers as converted

    state = SingleStreamDiT(operations=disable_weight_init, device=torch.device("meta")).state_dict()
    diffusers = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in converted(dict(state)).items()} == diffusers
    return {name: list(value.shape) for name, value in state.items()}


@pytest.fixture(scope="module", params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def theirs(comfyui: ComfyUI, name: str) -> Any:
    return diffusers_network(name)


@pytest.fixture(scope="module")
def denoiser(comfyui: ComfyUI, name: str, theirs: Any) -> Any:
    """ComfyUI's network as its own detection configures it from the shapes of a checkpoint."""
    shapes = {"z_image": z_image_shapes, "krea2": krea2_shapes}.get(name, klein_shapes)
    return detected(comfyui, shapes(theirs))


def detected(comfyui: ComfyUI, shapes: Mapping[str, list[int]]) -> Any:
    import comfy.model_detection
    import comfy.model_patcher

    state = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(state, "")
    config.set_inference_dtype(torch.bfloat16, None)
    meta = torch.device("meta")
    with torch.inference_mode(), meta:
        model = toy.network(config, device=meta)
    network = {name: tuple(value.shape) for name, value in model.diffusion_model.state_dict().items()}
    assert network == {name: tuple(shape) for name, shape in shapes.items()}
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=meta, offload_device=meta)
    return comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(patcher)


def adapters(comfyui: ComfyUI, denoiser: Any, config: Any) -> Any:
    return comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, device="meta", teacher="frozen")


def test_what_gets_a_lora(comfyui: ComfyUI, denoiser: Any, theirs: Any, name: str) -> None:
    """Every attention and MLP projection of all blocks, each with an A of its own; peft counts the same.

    For Z-Image these are the authors' targets, refiners included.
    """
    from peft import LoraConfig, inject_adapter_in_model

    real, ours = MODELS[name], adapters(comfyui, denoiser, denoiser.family.lora_config())
    assert (ours.config.rank, ours.config.alpha) == (RANK, 128.0)
    wanted = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=real.wanted)
    inject_adapter_in_model(wanted, theirs, low_cpu_mem_usage=True)
    injected = {n.replace(".default.", "."): p for n, p in theirs.named_parameters() if ".lora_" in n}
    shapes = {key: tuple(value.shape) for key, value in ours._views("student").items()}
    assert shapes == {key: tuple(value.shape) for key, value in injected.items()}
    assert len(ours.part_names()) == real.modules and len(shapes) == 2 * real.modules
    assert sum(parameter.numel() for parameter in ours.parameters()) == real.parameters
    reported = ours.config.size(denoiser.sites())
    assert reported == (real.modules, real.parameters)


def test_nothing_in_a_block_is_forgotten(denoiser: Any) -> None:
    """The Linears of the blocks without a LoRA turn the time into scales and shifts, or are Krea 2's text fusion."""
    config, inside = denoiser.family.lora_config(), {m for block in denoiser.blocks() for m in block.modules()}
    names = [part.name for site in denoiser.sites() if site.module in inside for part in site.parts]
    left = [name for name in names if name not in config.chosen(denoiser.sites()) and "text_fusion." not in name]
    assert all(name.split(".")[-2:] == ["adaLN_modulation", "0"] for name in left)


def test_patterns_choose_blocks(comfyui: ComfyUI, denoiser: Any, name: str) -> None:
    names = [part.name for site in denoiser.sites() for part in site.parts]
    for targets, count in MODELS[name].chosen.items():
        assert len(comfyui.core("adapters.targets").match_targets(names, targets)) == count, targets
