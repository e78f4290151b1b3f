"""One small random Z-Image twice: diffusers' network, and ComfyUI's MODEL with the same weights.

And what twins of every family share: a LoRA's gradients, ours through ComfyUI in training mode and peft's. Import only
after the `comfyui` fixture has booted ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import toy
from gradient import checkpointed
from inprocess import ComfyUI
from plain_step import relative
from torch import Tensor

__all__ = ["relative"]

HEADS, HEAD_DIM = 2, (8, 12, 12)
WIDTH = HEADS * sum(HEAD_DIM)


def diffusers_z_image(text_width: int = 64, layers: int = 2, seed: int = 0) -> Any:
    """diffusers' ZImageTransformer2DModel, every parameter filled, the padding tokens too."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        dim=WIDTH, n_heads=HEADS, n_kv_heads=HEADS, n_layers=layers, n_refiner_layers=1, cap_feat_dim=text_width,
        axes_dims=list(HEAD_DIM), axes_lens=[1536, 512, 512],
    )  # fmt: skip
    toy.fill(network, seed)
    return network.eval().requires_grad_(False)


def as_model(network: Any) -> Any:
    """The network's weights as a MODEL, the way a loader node leaves one: in inference mode.

    The names are translated by ComfyUI's own table, which is none of ours.
    """
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.utils import z_image_to_diffusers

    sizes = {
        "dim": network.config.dim, "cap_feat_dim": network.config.cap_feat_dim, "n_layers": network.config.n_layers,
        "n_refiner_layers": network.config.n_refiner_layers, "n_heads": network.config.n_heads,
        "n_kv_heads": network.config.n_kv_heads, "axes_dims": list(network.config.axes_dims),
        "axes_lens": list(network.config.axes_lens),
    }  # fmt: skip
    config = comfy.supported_models.ZImage(
        {
            **sizes, "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True, "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0, "multiple_of": 2, "z_image_modulation": True, "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = config.get_model({}, "")
        # ComfyUI sizes this hidden layer by the width, up to 1024, which the full model has
        kind, operations = type(model.diffusion_model.t_embedder), config.custom_operations or _plain_operations()
        model.diffusion_model.t_embedder = kind(
            1024, output_size=min(sizes["dim"], 256), dtype=torch.float32, operations=operations
        )
        weights = fused(network.state_dict(), z_image_to_diffusers(sizes))
        model.diffusion_model.load_state_dict(weights, strict=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fused(state: dict[str, Tensor], table: dict[str, Any]) -> dict[str, Tensor]:
    """diffusers' tensors under ComfyUI's names; q, k and v become the rows of one."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for name, value in state.items():
        target = table[name]
        key, start = (target, 0) if isinstance(target, str) else (target[0], target[1][1])
        pieces.setdefault(key, []).append((start, value))
    return {key: torch.cat([v for _, v in sorted(found, key=lambda item: item[0])]) for key, found in pieces.items()}


def _plain_operations() -> Any:
    import comfy.ops

    return comfy.ops.disable_weight_init


def velocity(network: Any, x: Tensor, sigma: float, features: list[Tensor]) -> Tensor:
    """noise - x0 [B, 16, h, w] by diffusers' network, which runs on 1 - sigma and predicts x0 - noise."""
    time = torch.full((len(x),), 1.0 - sigma)
    out = network(list(x.unsqueeze(2).unbind(0)), time, features, return_dict=False)[0]
    return -torch.stack(list(out)).squeeze(2)


# -- of every family ---------------------------------------------------------------------------------------------------


def new_adapters(
    comfyui: ComfyUI, denoiser: Any, rank: int, alpha: float, targets: tuple[str, ...] | None = None
) -> Any:
    """The student alone, on these targets or the family's own."""
    config = denoiser.family.lora_config(rank, alpha)
    config = config if targets is None else config.replace(targets=targets)
    return comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, teacher="frozen")


def random_student(
    comfyui: ComfyUI, model: Any, rank: int, seed: int = 3, targets: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The raw state of a student whose every weight does something."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    shapes = new_adapters(comfyui, denoiser, rank, 1.0, targets).state()
    return {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in shapes.items()}


def our_gradients(
    comfyui: ComfyUI, model: Any, start: dict[str, Tensor], alpha: int, x: Tensor, sigma: float,
    conditions: Sequence[Any], weight: Tensor, num_checkpointed: int = 0,
    targets: tuple[str, ...] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The velocity v [B, C, h, w] of a student, and the gradients of (v * weight).sum(); called as a node is."""
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    recomputing = checkpointed(comfyui, denoiser, num_checkpointed)
    rank = next(value.shape[0] for key, value in start.items() if ".lora_A." in key)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(x.shape):
        adapters = new_adapters(comfyui, denoiser, rank, alpha, targets)
        adapters.load_state("student", start)
        with adapters.attached(), recomputing:
            v = (x - denoiser.predict_x0(x, sigma, conditions)) / sigma
            (v * weight).sum().backward()
        return v.detach(), _gradients(adapters)


def _gradients(adapters: Any) -> dict[str, Tensor]:
    """The gradients of a set's student under the keys of its state."""
    found = []
    for adapter in adapters._adapters:
        rank = adapters.config.rank
        for number, b in enumerate(adapter.student.b):
            found += [adapter.student.a.grad[number * rank : (number + 1) * rank], b.grad]
    return dict(zip(adapters.state(), found, strict=True))


def peft_gradients(
    network: Any, start: dict[str, Tensor], alpha: int, predict: Callable[[], Tensor], weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of diffusers' network with peft's LoRA on it. predict: the network's velocity [B, C, h, w]."""
    from peft import LoraConfig

    names = sorted({key.rsplit(".lora_", 1)[0] for key in start})
    rank = next(value.shape[0] for key, value in start.items() if ".lora_A." in key)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), "ours")
    try:
        own = {key.replace(".ours.", "."): p for key, p in network.named_parameters() if ".ours." in key}
        assert own.keys() == start.keys()
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(start[key])
        v = predict()
        (v * weight).sum().backward()
        return v.detach(), {key: p.grad for key, p in own.items()}
    finally:
        network.delete_adapters("ours")
