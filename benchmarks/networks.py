"""The real architectures, built by ComfyUI's own classes, with any size, and with random weights or none."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")


def z_image(layers: int = 30, heads: int = 30, refiners: int = 2) -> tuple[str, dict[str, Any]]:
    """Z-Image of so many main blocks and width 128 * `heads`, as ComfyUI's detection configures it."""
    return "ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 128 * heads, "cap_feat_dim": 2560,
        "n_layers": layers, "n_refiner_layers": refiners, "qk_norm": True, "n_heads": heads, "n_kv_heads": heads,
        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }  # fmt: skip


def klein(double: int = 5, single: int = 20, heads: int = 24, context: int = 7680) -> tuple[str, dict[str, Any]]:
    """FLUX.2-klein 4B, or of so many blocks and width 128 * `heads`; the 9B is 8, 24, 32 and 12288."""
    return "Flux2", {
        "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": heads, "mlp_ratio": 3.0, "theta": 2000,
        "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
        "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "in_channels": 128,
        "hidden_size": 128 * heads, "context_in_dim": context, "patch_size": 1, "vec_in_dim": None, "depth": double,
        "depth_single_blocks": single, "guidance_embed": False, "yak_mlp": False, "txt_norm": False,
    }  # fmt: skip


KREA2_WIDE = ("first", "last", "tmlp", "tproj", "txtmlp")
"""What krea2_turbo_fp8_scaled has in 16 bits: with these it is 13.14 GB, as published, and without them 12.82."""


def krea2(blocks: int = 28, heads: int = 48, kv_heads: int = 12) -> tuple[str, dict[str, Any]]:
    """Krea 2 of so many blocks and width 128 * `heads`, as ComfyUI's detection configures it."""
    return "Krea2", {
        "image_model": "krea2", "features": 128 * heads, "channels": 16, "patch": 2, "layers": blocks, "heads": heads,
        "kvheads": kv_heads, "txtlayers": 12, "txtdim": 2560,
    }  # fmt: skip


def build(
    network: tuple[str, Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    compute: torch.dtype | None = None,
    load_device: torch.device | None = None,
) -> Any:
    """The MODEL (ModelPatcher), as a loader node makes it, with weights in `dtype` on `device` that are not filled in.

    compute: the dtype of activations, where it is another. load_device: where it runs, `device` if not given.
    """
    supported, patcher = (importlib.import_module(f"comfy.{name}") for name in ("supported_models", "model_patcher"))
    kind, settings = network
    config = getattr(supported, kind)(dict(settings))
    config.set_inference_dtype(dtype, compute)
    with torch.inference_mode():
        model = config.get_model({}, "", device=device)
    home = device if device.type == "meta" else torch.device("cpu")
    return patcher.ModelPatcher(model, load_device=load_device or device, offload_device=home)


def widen(module: nn.Module, paths: Sequence[str], dtype: torch.dtype) -> None:
    """Gives the weights of the modules at `paths` another dtype, in place."""
    with torch.inference_mode():
        for path in paths:
            module.get_submodule(path).to(dtype)


def fill(module: nn.Module, device: torch.device) -> nn.Module:
    """Random values in place, of a size that keeps activations near 1; drawn on `device`, where that is fast."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, device=device, dtype=torch.float32)
                parameter.copy_(noise.mul_(parameter[0].numel() ** -0.5))
            else:
                parameter.copy_(torch.ones(parameter.shape))
    return module


# -- behind a Denoiser -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Network:
    """A random network behind a Denoiser.

    Attributes:
        title: the library that it comes from.
        denoiser: the Denoiser.
        module: the network.
        memory: `nodes.comfy_host.memory_plan` if it is ComfyUI's, else None.
    """

    title: str
    denoiser: Any
    module: nn.Module
    memory: Any = None

    @property
    def weight_bytes(self) -> int:
        """Of the network."""
        return sum(p.numel() * p.itemsize for p in self.module.parameters())

    def trainable(self, shape: Sequence[int], reserve: int = 0) -> Any:
        """Ready for gradients, inside the `with`."""
        return self.denoiser.trainable(shape, reserve) if hasattr(self.denoiser, "trainable") else nullcontext()


def comfyui(
    network: tuple[str, Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    weights: torch.dtype | None = None,
    wide: Sequence[str] = (),
) -> Network:
    """ComfyUI's class and the denoiser of our training node.

    Args:
        weights: their dtype where it is another; they are made in RAM then, as a loader node does it.
        wide: modules whose weights have `dtype` all the same, as in published 8-bit files.
    """
    modules = pack(device)
    home = torch.device("cpu") if weights and device.type == "cuda" else device
    model = build(network, home, weights or dtype, dtype if weights else None, device)
    module = model.model.diffusion_model
    if weights:
        widen(module, wide, dtype)
    if device.type != "meta":
        with torch.inference_mode():
            fill(module, device)
    return Network(
        "ComfyUI", modules("comfy_host.denoiser").ComfyDenoiser(model), module, modules("comfy_host.memory_plan")
    )


def diffusers(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Network:
    """diffusers' class."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a denoiser computes in the dtype that its weights have when it is made
    try:
        with torch.device(device):
            denoiser = make()
    finally:
        torch.set_default_dtype(before)
    fill(denoiser.transformer, device)
    return Network("diffusers", denoiser, denoiser.transformer)


def pack(device: torch.device) -> Callable[[str], Any]:
    """name -> module of our `nodes` folder, without ComfyUI's server and without registering any node."""
    if "dopsd_pack" not in sys.modules:
        sys.path.insert(0, str(COMFYUI))
        importlib.import_module("comfy.options")
        importlib.import_module("comfy.cli_args").args.cpu = device.type != "cuda"
        sys.modules.setdefault("server", types.SimpleNamespace(PromptServer=None))  # type: ignore[arg-type]
        for name, path in (("dopsd_pack", ROOT), ("dopsd_pack.nodes", ROOT / "nodes")):
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
    return lambda name: importlib.import_module(f"dopsd_pack.nodes.{name}")
