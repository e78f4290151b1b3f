"""A whole model that training without ComfyUI wrote is loaded by ComfyUI and computes what the student does; inside
ComfyUI full weights are not offered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import klein_twins
import krea2_twins
import pytest
import torch
import twins
from inprocess import ComfyUI
from torch import Tensor

SIGMA = 0.7


def student(comfyui: ComfyUI, denoiser: Any, family: Any, file: Path, predict: Callable[[Any], Tensor]) -> Tensor:
    """The prediction of a student whose every weight is changed; writes it to `file` as a run does."""
    full = comfyui.core("adapters").Full(saved_dtype="fp32")
    weights = full.build(denoiser, comfyui.core("teachers").FrozenTeacher(), 0)
    generator = torch.Generator().manual_seed(4)
    state = weights.state()
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    weights.load_state("student", moved)
    untouched = predict(denoiser)
    with weights.attached():
        wanted = predict(denoiser)
    assert twins.relative(wanted, untouched) > 0.01
    full.save(file, weights.state(), family, {"dopsd_step": "1"})
    return wanted


def predicting(comfyui: ComfyUI, family: Any, width: int) -> Callable[[Any], Tensor]:
    """With a text of 512 tokens, to which ComfyUI pads klein's."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *family.latent_shape(64, 96), generator=generator)
    condition = comfyui.core("conditioning.encode").Condition(torch.randn(512, width, generator=generator))

    def predict(denoiser: Any) -> Tensor:
        with torch.no_grad():
            return denoiser.predict_x0(x, SIGMA, [condition])

    return predict


def inside(comfyui: ComfyUI, model: Any, predict: Callable[[Any], Tensor], family: Any) -> Tensor:
    """The prediction of the MODEL in ComfyUI."""
    shape = (1, *family.latent_shape(64, 96))
    with comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model).loaded(shape) as denoiser:
        return comfyui.call(torch.inference_mode()(predict), denoiser)


@pytest.fixture
def file(comfyui: ComfyUI) -> Iterator[Path]:
    """A file that UNETLoader finds."""
    path = comfyui.base / "models" / "diffusion_models" / "test_full_weights.safetensors"
    yield path
    path.unlink(missing_ok=True)


CASES = {
    "klein": ("flux2_klein", "flux-2-klein-4b", klein_twins.diffusers_klein, "klein.KleinDenoiser"),
    "krea 2": ("krea2", "krea2_turbo_bf16", krea2_twins.diffusers_krea2, "krea2.Krea2Denoiser"),
}


@pytest.mark.parametrize("case", CASES)
def test_comfyuis_loader_takes_the_file(
    comfyui: ComfyUI, stock: Callable[..., None], file: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from comfy.cli_args import args

    name, original, as_diffusers, host = CASES[case]
    module, kind = host.split(".")
    stock(f"diffusion_models/{original}")
    monkeypatch.setattr(args, "fp32_unet", True)
    load = torch.inference_mode()(comfyui.nodes.UNETLoader().load_unet)
    (base,) = comfyui.call(load, f"{original}.safetensors", "default")
    family = comfyui.core("families").FAMILIES[name]
    predict = predicting(comfyui, family, comfyui.module("nodes.comfy_host.fits").text_width(base))
    denoiser = getattr(comfyui.core(f"standalone.hosts.{module}"), kind)(as_diffusers(base))
    assert twins.relative(predict(denoiser), inside(comfyui, base, predict, family)) < 1e-5, "the twins differ"

    wanted = student(comfyui, denoiser, family, file, predict)
    (trained,) = comfyui.call(load, file.name, "default")
    assert twins.relative(inside(comfyui, trained, predict, family), wanted) < 1e-5


def test_the_demo_model_which_is_a_z_image(comfyui: ComfyUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, demo = comfyui.core("demo.model_files"), comfyui.module("nodes.comfy_host.demo_models")
    hosts, family = comfyui.core("standalone.hosts.demo"), comfyui.core("families").Z_IMAGE
    predict = predicting(comfyui, family, files.TEXT_WIDTH)
    transformer = comfyui.core("standalone.hosts.demo_weight_files").load_transformer(files.WEIGHTS / files.MODEL_FILE)
    wanted = student(comfyui, hosts.StandaloneDenoiser(transformer), family, tmp_path / files.MODEL_FILE, predict)
    monkeypatch.setattr(demo.demo, "WEIGHTS", tmp_path)
    model = comfyui.call(torch.inference_mode()(demo.load_model))
    assert twins.relative(inside(comfyui, model, predict, family), wanted) < 1e-4


# -- not inside ComfyUI ------------------------------------------------------------------------------------------------


def test_training_settings_does_not_offer_it(comfyui: ComfyUI) -> None:
    inputs = {entry.id: entry for entry in comfyui.pack_nodes["DOPSD_TrainingSettings"].define_schema().inputs}
    assert inputs["adapter"].options == ["lora", "dora", "lokr"]
    assert "saved_dtype" not in inputs and "all weights" not in inputs["adapter"].tooltip


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("full", "which ComfyUI may stream or quantise: choose lora, dora, lokr, or train with python -m dopsd_core"),
        ("loha", "adapter is 'loha'; choose one of lora, dora, lokr"),
    ],
)
def test_a_graph_that_asks_for_it_gets_a_sentence(comfyui: ComfyUI, adapter: str, message: str) -> None:
    graph = {
        "settings": {"class_type": "DOPSD_TrainingSettings", "inputs": {"adapter": adapter}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["settings", 0]}},
    }
    run = comfyui.execute(graph)
    assert run.status != "success" and message in str(run.error)


def test_its_denoiser_is_refused_before_training(comfyui: ComfyUI) -> None:
    """Whatever asks for it: the host has no plain weights to give."""
    denoiser = SimpleNamespace(sites=list, blocks=list, predict_x0=None, device="cpu", compute_dtype=torch.float32)
    host = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser
    assert not hasattr(host, "network")
    with pytest.raises(ValueError, match="which ComfyUI may stream or quantise"):
        comfyui.core("adapters").Full().require_host(denoiser)
