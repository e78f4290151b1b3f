"""Quantised base models, by the backends of diffusers that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

_PACKAGES: Mapping[str, str] = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "optimum-quanto"}
_MODULES: Mapping[str, str] = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto"}


def quantisation_config(name: str, dtype: torch.dtype, has_gpu: bool) -> Any:
    """diffusers' configuration for one of `model_options.QUANTISATIONS`, computing in `dtype`; None for "none".

    Raises:
        ValueError: the backend is not installed, or needs a GPU and there is none.
    """
    if name == "none":
        return None
    backend, _, kind = name.partition("-")
    if not _is_installed(_MODULES[backend]):
        package = _PACKAGES[backend]
        raise ValueError(f"--quantise {name} needs {package}, which is not installed: pip install {package}")
    if backend == "bnb" and not has_gpu:
        raise ValueError(f"--quantise {name} needs a GPU: choose torchao-int8 or quanto-int8 on a CPU")
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    if backend == "bnb" and kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if backend == "bnb":
        return BitsAndBytesConfig(load_in_8bit=True)
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

        return TorchAoConfig(Int8WeightOnlyConfig())
    return QuantoConfig(weights_dtype="int8")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent package
        return False
