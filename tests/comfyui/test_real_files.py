"""benchmarks/real_files.py: ComfyUI's own detection takes its layouts for the published models. No weights are made."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import stock_files
import torch
from inprocess import ROOT, ComfyUI
from torch import Tensor, nn

NAMES = (
    "diffusion_models/z_image_turbo_bf16", "text_encoders/qwen_3_4b", "text_encoders/qwen3vl_4b_fp8_scaled", "vae/ae",
)  # fmt: skip


@pytest.fixture(scope="module")
def real_files(comfyui: ComfyUI) -> ModuleType:
    sys.path.append(str(ROOT))  # last, where our nodes/ hides nothing of ComfyUI's
    try:
        return importlib.import_module("benchmarks.real_files")
    finally:
        sys.path.remove(str(ROOT))


def made(real_files: ModuleType, name: str) -> dict[str, Tensor]:
    make, _ = real_files.FILES[name]
    return make().state_dict()


def test_every_file_is_tested_here(real_files: ModuleType) -> None:
    assert tuple(real_files.FILES) == NAMES


def test_detection_finds_z_image_at_its_width(real_files: ModuleType) -> None:
    from comfy import model_detection

    state = made(real_files, "diffusion_models/z_image_turbo_bf16")
    config = model_detection.model_config_from_unet(state, "")
    found = config.unet_config
    assert (type(config).__name__, found["dim"], found["n_layers"], found["n_heads"]) == ("ZImage", 3840, 30, 30)


@pytest.mark.parametrize(("name", "kind"), [("qwen_3_4b", "QWEN3_4B"), ("qwen3vl_4b_fp8_scaled", "QWEN3VL_4B")])
def test_detection_finds_the_text_encoders(real_files: ModuleType, name: str, kind: str) -> None:
    import comfy.sd

    assert comfy.sd.detect_te_model(made(real_files, f"text_encoders/{name}")) is comfy.sd.TEModel[kind]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_small_files(real_files: ModuleType, name: str) -> None:
    """Which ComfyUI's loader nodes load, in test_stock_files.py; those have fewer blocks."""

    def layers(state: dict[str, Tensor]) -> set[str]:
        return {".".join("*" if part.isdigit() else part for part in key.split(".")) for key in state}

    small, _ = stock_files.FILES[name]
    assert layers(made(real_files, name)) == layers(small())


def test_random_values_keep_activations_near_1(real_files: ModuleType) -> None:
    layer = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64)).to("meta")
    state = real_files.random_state(layer, torch.device("cpu"))
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert 0.9 < float(state["0.weight"].float().std()) * 16 < 1.1
    assert [float(state[f"1.{part}"].float().mean()) for part in ("weight", "bias")] == [1, 0]
    again = real_files.random_state(layer, torch.device("cpu"))
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_what_is_there_is_not_written_again(
    real_files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_files, "FILES", {"vae/x": (lambda: nn.Linear(2, 2, device="meta"), False)})
    size = real_files.write(tmp_path, torch.device("cpu"))
    first = (tmp_path / "vae" / "x.safetensors").stat()
    assert real_files.write(tmp_path, torch.device("cpu")) == size == first.st_size
    assert (tmp_path / "vae" / "x.safetensors").stat().st_mtime_ns == first.st_mtime_ns
