"""A saved LoRA draws the same in ComfyUI, in diffusers and in peft: what the student drew at the end of training.

The networks are small and random, all three with the same weights. alpha is not the rank, so a loader that leaves out
or repeats alpha / rank draws something else.
"""

from __future__ import annotations

import copy
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from inprocess import ComfyUI
from loras import give_values
from torch import Tensor

RANK, ALPHA, SEED, STEPS = 4, 10.0, 11, 8
WIDTH, HEIGHT = 112, 80  # 35 tokens, padded to 64
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def network() -> Any:
    return twins.diffusers_z_image()


@pytest.fixture(scope="module")
def model(comfyui: ComfyUI, network: Any) -> Any:
    return twins.as_model(network)


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(23, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def adapters(comfyui: ComfyUI, model: Any) -> Any:
    """What training leaves: a student whose every weight does something."""
    denoiser = comfyui.module("nodes.host").ComfyDenoiser(model)
    config = denoiser.family.lora_config(RANK, ALPHA)
    adapters = comfyui.core("adapters").AdapterSet(denoiser.sites(), config, teacher="frozen")
    generator = torch.Generator().manual_seed(6)
    values = {key: torch.randn(t.shape, generator=generator) * 0.1 for key, t in adapters.state().items()}
    adapters.load_state("student", values)
    return adapters


@pytest.fixture(scope="module")
def saved(comfyui: ComfyUI, adapters: Any) -> Path:
    """The file of Save LoRA (D-OPSD); the peft folder lies beside it."""
    folded = comfyui.core("lora_file").fold_alpha(adapters.state(), adapters.config)
    tensors = {f"transformer.{key}": value for key, value in folded.items()}
    lora = comfyui.module("nodes.sockets").TrainedLora(tensors, {"dopsd_family": "z_image"})
    inputs = {"lora": ["lora", 0], "filename_prefix": "loras/three_ways", "dtype": "fp32", "peft_folder": True}
    run = comfyui.execute(
        {
            "lora": give_values(comfyui, ("LORA_MODEL",), [lora]),
            "save": {"class_type": "DOPSD_SaveLoRA", "inputs": inputs},
        }
    )
    assert run.status == "success", run.error
    return Path(run.value("save"))


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.manual_seed(SEED))


@pytest.fixture(scope="module")
def students(comfyui: ComfyUI, model: Any, adapters: Any, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of the untouched model, and of the student in the trainer."""
    core, condition = comfyui.core("rollout"), comfyui.core("conditioning").Condition(features)
    denoiser = comfyui.module("nodes.host").ComfyDenoiser(model)
    sigmas = denoiser.family.sigmas(STEPS, WIDTH, HEIGHT)

    def draw() -> Tensor:
        return core.sample(denoiser, [condition], noise, sigmas)

    with torch.inference_mode(), denoiser.loaded(noise.shape):
        base = draw()
        with adapters.attached():
            return base, draw()


def assert_same(latents: Tensor, students: tuple[Tensor, Tensor]) -> None:
    base, student = students
    effect = (student - base).norm()
    assert effect > 0.1 * base.norm()
    assert twins.relative(latents, student) < TOLERANCE
    assert (latents - student).norm() < 1e-3 * effect


def test_comfyuis_loader_uses_every_key(
    comfyui: ComfyUI, model: Any, saved: Path, features: Tensor, students: Any, caplog: Any
) -> None:
    graph = {
        "given": give_values(comfyui, ("MODEL", "CONDITIONING"), [model, [[features[None], {}]]]),
        "lora": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["given", 0], "lora_name": saved.name, "strength_model": 1.0},
        },
        "sample": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {
                "model": ["lora", 0], "positive": ["given", 1], "seed": SEED, "steps": STEPS, "width": WIDTH,
                "height": HEIGHT, "batch_size": 1, "sampler": "euler",
            },
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["sample", 0]}},
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        run = comfyui.execute(graph)
    assert run.status == "success", run.error
    assert "not loaded" not in caplog.text.lower()
    assert sum(len(entries) for entries in run.value("lora").patches.values()) == 7 * 4
    assert_same(model.model.process_latent_in(run.value("sample")["samples"]), students)


def test_diffusers(network: Any, saved: Path, features: Tensor, students: Any, noise: Tensor) -> None:
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    nothing: Any = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = ZImagePipeline(scheduler, nothing, nothing, nothing, network)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(saved.parent), weight_name=saved.name)
    try:
        latents = pipeline(
            prompt_embeds=[features], latents=noise, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
            guidance_scale=0.0, output_type="latent",
        ).images  # fmt: skip
    finally:
        pipeline.unload_lora_weights()
    assert_same(latents, students)


def test_peft(comfyui: ComfyUI, network: Any, saved: Path, features: Tensor, students: Any, noise: Tensor) -> None:
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(network), str(saved.with_name(f"{saved.stem}peft")))
    x, sigmas = noise, comfyui.core("sigmas").z_image_turbo_sigmas(STEPS)
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * twins.velocity(loaded, x, sigma, [features])
    assert_same(x, students)
