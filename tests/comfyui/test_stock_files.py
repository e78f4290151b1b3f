"""The shipped workflows from end to end, through ComfyUI's own loader nodes and on the files that they name.

The files are small and random (stock_files.py); layouts, detection, loaders, encoders and the executor are real.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import stock_files
from graphs import node_of, shipped, shrunk
from inprocess import ROOT, ComfyUI
from PIL import Image, ImageStat
from runs import Run
from safetensors import safe_open
from torch import Tensor

Stock = Callable[..., None]

PAIRS = {
    "z_image_turbo_train": "z_image_turbo_sample",
    "klein_train": "klein_sample",
    "klein_edit_train": "klein_edit_sample",
    "krea2_train": "krea2_sample",
}
"""A workflow that trains, and the one that samples with its LoRA."""
LOOKS = ("z_image_turbo_teacher_preview", "krea2_teacher_preview", "compare", "report_card")
"""Those that only show images, of the dataset and of the LoRA of z_image_turbo_train."""
UP_TO_CONDITIONS = (
    "CLIPLoader", "VAELoader", "DOPSD_LoadTeacherVision", "DOPSD_LoadDataset", "DOPSD_BuildTeacherCondition",
)  # fmt: skip
VERY_SHORT = {"steps": 2, "rollout_steps": 2, "probe_every": 2}
PREVIEWS = {"z_image_turbo_train": 2}
"""Of those workflows the images while they train, which take most of the time."""


@pytest.fixture(scope="module")
def train(comfyui: ComfyUI, stock: Stock) -> Callable[[str], Run]:
    """train(name): the run of that workflow on all files, done once."""
    stock()
    done: dict[str, Run] = {}
    for folder, write in (("my_concept", stock_files.write_concept), ("my_edit", stock_files.write_edits)):
        shutil.rmtree(comfyui.input / folder, ignore_errors=True)
        write(comfyui.input / folder)
    shutil.copy(comfyui.input / "my_concept" / "snow.png", comfyui.input / "example.png")
    shutil.rmtree(comfyui.output / "loras", ignore_errors=True)

    def trained(name: str) -> Run:
        if name not in done:
            settings = {**VERY_SHORT, "preview_every": PREVIEWS.get(name, 0)}
            done[name] = comfyui.execute(shrunk(shipped(name), **settings))
        return done[name]

    return trained


def images_of(comfyui: ComfyUI, run: Run) -> list[Image.Image]:
    """Everything that the run's nodes show."""
    folders = {"temp": comfyui.temp, "output": comfyui.output}
    shown = [image for output in run.outputs.values() for image in output.get("images", [])]
    return [Image.open(folders[i["type"]] / i["subfolder"] / i["filename"]).convert("RGB") for i in shown]


def varies(image: Image.Image) -> bool:
    return max(ImageStat.Stat(image).stddev) > 10


def test_every_workflow_that_loads_files_is_run_here() -> None:
    names = [path.stem for path in (ROOT / "workflows" / "api").glob("*.json")]
    loading = {name for name in names if any(node["class_type"] == "UNETLoader" for node in shipped(name).values())}
    assert loading == {*PAIRS, *PAIRS.values(), *LOOKS}


@pytest.mark.parametrize("name", PAIRS)
def test_trains(comfyui: ComfyUI, train: Callable[[str], Run], name: str) -> None:
    run, graph = train(name), shipped(name)
    assert run.status == "success", run.error
    model = run.value(node_of(graph, "UNETLoader"))
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    lora = run.value(node_of(graph, "DOPSD_TrainLoRA"))
    modules, parameters = denoiser.family.lora_config(4).size(denoiser.sites())
    assert (len(lora), sum(value.numel() for value in lora.values())) == (2 * modules, parameters)
    assert all(value.isfinite().all() for value in lora.values())
    assert any(value.abs().max() > 0 for key, value in lora.items() if ".lora_B." in key)
    assert len(run.previews(node_of(graph, "DOPSD_TrainLoRA"))) == 2  # with the chart, or the chart alone
    assert images_of(comfyui, run) and all(varies(image) for image in images_of(comfyui, run))
    saved = Path(run.value(node_of(graph, "DOPSD_SaveLoRA")))
    with safe_open(saved, "pt") as file:
        facts = file.metadata()
    assert facts["dopsd_base_model"] == graph[node_of(graph, "UNETLoader")]["inputs"]["unet_name"]


@pytest.mark.parametrize(("training", "sampling"), PAIRS.items())
def test_samples_with_what_was_trained(
    comfyui: ComfyUI, train: Callable[[str], Run], training: str, sampling: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(training).status == "success"
    graph = shrunk(shipped(sampling))
    with caplog.at_level(logging.WARNING):
        with_it = comfyui.execute(graph)
    assert with_it.status == "success", with_it.error
    assert "not loaded" not in caplog.text
    patched = with_it.value(node_of(graph, "LoraLoaderModelOnly"))
    lora = train(training).value(node_of(shipped(training), "DOPSD_TrainLoRA"))
    assert 2 * sum(len(entries) for entries in patched.patches.values()) == len(lora)
    graph[node_of(graph, "LoraLoaderModelOnly")]["inputs"]["strength_model"] = 0.0
    without = comfyui.execute(graph, keep_cache=True)
    (drawn,), (base,) = images_of(comfyui, with_it), images_of(comfyui, without)
    assert varies(drawn) and drawn.tobytes() != base.tobytes()


@pytest.mark.long
def test_conditions_of_an_8_bit_text_encoder(comfyui: ComfyUI, train: Callable[[str], Run]) -> None:
    """Near those of the plain file; and not those, from the cache."""

    def features(file: str) -> list[Tensor]:
        whole = shrunk(shipped("z_image_turbo_teacher_preview"))
        graph = {key: node for key, node in whole.items() if node["class_type"] in UP_TO_CONDITIONS}
        graph[node_of(graph, "CLIPLoader")]["inputs"]["clip_name"] = f"{file}.safetensors"
        conditions = node_of(graph, "DOPSD_BuildTeacherCondition")
        graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": [conditions, 0]}}
        run = comfyui.execute(graph, keep_cache=True)
        assert run.status == "success", run.error
        pairs = run.value(conditions).data.pairs
        return [condition.features for pair in pairs for condition in (pair.student, pair.teacher)]

    for rounded, plain in zip(features("qwen_3_4b_fp8_mixed"), features("qwen_3_4b"), strict=True):
        assert 1e-3 < (rounded - plain).norm() / plain.norm() < 0.3  # 28 layers of random weights, 3 % each


@pytest.mark.parametrize("name", [*LOOKS[:-1], pytest.param(LOOKS[-1], marks=pytest.mark.long)])
def test_looks(comfyui: ComfyUI, train: Callable[[str], Run], name: str) -> None:
    assert train("z_image_turbo_train").status == "success"
    run = comfyui.execute(shrunk(shipped(name)), keep_cache=True)
    assert run.status == "success", run.error
    assert images_of(comfyui, run) and all(varies(image) for image in images_of(comfyui, run))
