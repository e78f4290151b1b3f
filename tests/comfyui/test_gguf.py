"""Bases and text encoders of ComfyUI-GGUF's own loader nodes: right gradients, whole trainings, an untouched MODEL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import stock_files
import torch
from bases import drawn, train, unload
from conftest import give_up
from gradient import SELECTIVE, difference, equal, gradients
from graphs import node_of, shipped, shrunk
from inprocess import ComfyUI
from loras import random_lora
from torch import Tensor

NETWORKS = {
    "z_image_turbo": (stock_files.z_image, "lumina2", "z_image_turbo_train"),
    "flux-2-klein-4b": (stock_files.klein, "flux", "klein_train"),
}
ROUNDED = {"Q8_0": 0.024, "Q5_1": 0.25, "Q4_0": 0.4, "BF16": 1e-6, "F16": 1e-3}
"""How far the gradients of a form may be from those of the weights that were written."""


@pytest.fixture(scope="module", autouse=True)
def pack(comfyui: ComfyUI) -> Iterator[None]:
    if reason := gguf_files.why_not():
        give_up(reason)
    gguf_files.load_pack(comfyui)
    with stock_files.thin():
        yield


@pytest.fixture(scope="module")
def load(comfyui: ComfyUI) -> Callable[[str, str], Any]:
    """load(network, form): the MODEL as UnetLoaderGGUF gives it."""

    def loaded(network: str, form: str) -> Any:
        written(comfyui, network, form)
        loader = comfyui.nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
        (model,) = comfyui.call(torch.inference_mode()(loader.load_unet), f"{network}-{form}.gguf")
        assert type(model).__name__ == "GGUFModelPatcher"
        return model

    return loaded


def written(comfyui: ComfyUI, network: str, form: str) -> str:
    make, architecture, _ = NETWORKS[network]
    path = comfyui.base / "models" / "diffusion_models" / f"{network}-{form}.gguf"
    if not path.exists():
        gguf_files.write(path, make(), architecture, form)
    return path.name


def dense(comfyui: ComfyUI, model: Any) -> Any:
    """A MODEL of plain tensors with the same weights, dequantised by the pack's own functions."""
    import comfy.model_patcher

    config = type(model.model.model_config)(dict(model.model.model_config.unet_config))
    config.set_inference_dtype(torch.float32, None)
    plain = config.get_model({}, "")
    values: dict[str, Tensor] = {}
    with torch.inference_mode():
        for path, module in model.model.diffusion_model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own and hasattr(type(module), "cast_bias_weight") and module.weight is not None:
                weight, bias = module.cast_bias_weight(torch.zeros(1))
                own = {"weight": weight} | ({} if bias is None else {"bias": bias})
            for name, value in own.items():
                values[f"{path}.{name}".lstrip(".")] = torch.Tensor(value).as_subclass(Tensor).float().cpu()
        plain.diffusion_model.load_state_dict(values)
    return comfy.model_patcher.ModelPatcher(plain, model.load_device, model.offload_device)


@pytest.mark.parametrize(
    "form", [form if form in ("Q4_0", "F16") else pytest.param(form, marks=pytest.mark.long) for form in ROUNDED]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_of_the_dequantised_weights(comfyui: ComfyUI, load: Any, network: str, form: str) -> None:
    model = load(network, form)
    twin = dense(comfyui, model)
    dtype = model.model.get_dtype_inference()
    twin.model.manual_cast_dtype = None if dtype == torch.float32 else dtype
    got = gradients(comfyui, model)
    if dtype == torch.float32:  # where ComfyUI computes in another dtype, the twin's norms are rounded otherwise
        assert difference(got, gradients(comfyui, twin)) < 1e-5
    for recompute in (99, SELECTIVE):
        assert equal(gradients(comfyui, model, recompute=recompute), got)
    exact = load(network, "BF16")  # as the values that were written
    slack = 0 if dtype == torch.float32 else 0.05
    assert difference(got, gradients(comfyui, exact)) < ROUNDED[form] + slack


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_with_weights_in_ram_are_the_same(
    comfyui: ComfyUI,
    load: Any,
    half_in_ram: Any,  # noqa: F811
    network: str,
) -> None:
    model = load(network, "Q8_0")
    wanted = gradients(comfyui, model)
    half_in_ram()
    assert equal(gradients(comfyui, model), wanted)
    unload(comfyui)


def test_gradients_on_a_patched_base(comfyui: ComfyUI, load: Any) -> None:
    """ComfyUI-GGUF puts a LoRA on in each use of the weight; the backward must see the same weight."""
    model = load("z_image_turbo", "BF16")
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    loader = comfyui.nodes.NODE_CLASS_MAPPINGS["LoraModelLoader"]
    patched = comfyui.call(lambda: loader.execute(model, lora, 1.0).args[0])
    wanted = comfyui.call(lambda: loader.execute(dense(comfyui, model), lora, 1.0).args[0])
    base, got = gradients(comfyui, model), gradients(comfyui, patched)
    assert difference(base, got) > 0.1
    if model.model.get_dtype_inference() == torch.float32:
        assert difference(got, gradients(comfyui, wanted)) < 1e-4
    assert equal(gradients(comfyui, model), base)


@pytest.mark.long
@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "BF16"])
@pytest.mark.parametrize("network", ["z_image_turbo", "flux-2-klein-4b"])
def test_a_whole_training(comfyui: ComfyUI, load: Any, network: str, form: str) -> None:
    """The shipped workflow with UnetLoaderGGUF for its loader; the MODEL draws the same afterwards."""
    file, template = written(comfyui, network, form), NETWORKS[network][2]
    folder = f"{network}-{form}"
    stock_files.write(comfyui.base / "models")
    stock_files.write_concept(comfyui.input / folder)
    graph = shrunk(shipped(template), steps=2, probe_every=1)
    graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["folder"] = folder
    unet, trains = node_of(graph, "UNETLoader"), node_of(graph, "DOPSD_TrainLoRA")
    graph[unet] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": file}}
    graph[trains]["inputs"]["run_name"] = folder
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    lora = run.value(trains)
    assert lora.facts["dopsd_base_model"] == file and "dopsd_base_model_note" not in lora.facts
    assert all(value.isfinite().all() for value in lora.values())
    assert any(value.abs().max() > 0 for key, value in lora.items() if ".lora_B." in key)
    assert torch.equal(drawn(comfyui, run.value(unet)), drawn(comfyui, load(network, form)))


def test_an_undistilled_file_is_recognised_by_its_name(comfyui: ComfyUI) -> None:
    """In Teacher Preview, on the training node and in the LoRA's header."""
    folder = comfyui.base / "models" / "diffusion_models"
    gguf_files.write(folder / "flux-2-klein-base-4b-Q8_0.gguf", stock_files.klein(), "flux", "Q8_0")
    stock_files.write(comfyui.base / "models")
    stock_files.write_concept(comfyui.input / "undistilled")
    graph = shrunk(shipped("klein_train"), steps=2, probe_every=0, preview_every=0)
    graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["folder"] = "undistilled"
    unet, trains = node_of(graph, "UNETLoader"), node_of(graph, "DOPSD_TrainLoRA")
    graph[unet] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "flux-2-klein-base-4b-Q8_0.gguf"}}
    graph[trains]["inputs"]["run_name"] = "undistilled"
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    warning = "flux-2-klein-base-4b-Q8_0.gguf looks like an undistilled checkpoint (by its name)"
    assert warning in run.texts(trains)[-1] and warning in run.texts(node_of(graph, "DOPSD_TeacherPreview"))[-1]
    assert run.value(trains).facts["dopsd_undistilled"] == "by its name"


def test_a_base_without_a_name_is_trained_and_the_node_and_the_header_say_so(comfyui: ComfyUI, load: Any) -> None:
    run = train(comfyui, load("z_image_turbo", "Q8_0"), "nameless")  # its loader is not in the graph
    note = comfyui.module("nodes.comfy_host.base_name").UNKNOWN
    assert run.texts("train")[-1].split("\n").count(note) == 1
    facts = run.value("train").facts
    assert (facts["dopsd_base_model"], facts["dopsd_base_model_note"]) == ("", note)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lumina2", "flux2"])
def test_conditions_of_a_gguf_text_encoder(comfyui: ComfyUI, kind: str) -> None:
    """CLIPLoaderGGUF's Qwen3-4B gives the features of the same weights out of the plain file, the teacher's too."""
    models = comfyui.base / "models"
    stock_files.write(models)
    path: Path = models / "text_encoders" / "qwen_3_4b-BF16.gguf"
    if not path.exists():
        gguf_files.write(path, gguf_files.language_model(), "qwen3", "BF16")
    folder = f"gguf-text-{kind}"
    stock_files.write_concept(comfyui.input / folder)
    template = "z_image_turbo_train" if kind == "lumina2" else "klein_train"

    def conditions(loader: str, file: str) -> list[Tensor]:
        whole = shrunk(shipped(template))
        kept = (
            "CLIPLoader",
            "VAELoader",
            "DOPSD_LoadTeacherVision",
            "DOPSD_LoadDataset",
            "DOPSD_BuildTeacherCondition",
        )
        graph = {key: node for key, node in whole.items() if node["class_type"] in kept}
        graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["folder"] = folder
        graph[node_of(graph, "CLIPLoader")] = {"class_type": loader, "inputs": {"clip_name": file, "type": kind}}
        build = node_of(graph, "DOPSD_BuildTeacherCondition")
        graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": [build, 0]}}
        run = comfyui.execute(graph)
        assert run.status == "success", run.error
        pairs = run.value(build).data.pairs
        return [side.features for pair in pairs for side in (pair.student, pair.teacher)]

    plain = conditions("CLIPLoader", "qwen_3_4b.safetensors")
    assert difference(conditions("CLIPLoaderGGUF", path.name), plain) < 0.02  # the embedding is rounded to fp16
