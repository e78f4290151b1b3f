"""A saved LoRA draws the same in ComfyUI, in diffusers and in peft: what the student drew at the end of training.

The networks are small and random, all three with the same weights. alpha is not the rank, so a loader that leaves out
or repeats alpha / rank draws something else.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import klein_twins
import krea2_twins
import pytest
import torch
import twins
from inprocess import ComfyUI
from loras import give_values
from torch import Tensor

RANK, ALPHA, SEED = 4, 10.0, 11
WIDTH, HEIGHT = 112, 80  # for Z-Image 35 tokens, padded to 64
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Twins:
    """A network of diffusers' and the MODEL of ComfyUI with its weights, the conditions of both [L, D], the number of
    steps, and of the parts that get a LoRA; targets beside the family's own."""

    network: Any
    model: Any
    features: Tensor
    steps: int
    parts: int
    targets: tuple[str, ...] = ()

    def velocity(self, network: Any, x: Tensor, sigma: float) -> Tensor:
        library = {"z_image": twins, "flux2_klein": klein_twins, "krea2": krea2_twins}[self.family]
        return library.velocity(network, x, sigma, [self.features])

    @property
    def family(self) -> str:
        kinds = {"ZImage": "z_image", "Flux2": "flux2_klein", "Krea2": "krea2"}
        return kinds[type(self.model.model.model_config).__name__]


def text(length: int, width: int) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(5))


def z_image() -> Twins:
    network = twins.diffusers_z_image()
    return Twins(network, twins.as_model(network), text(23, 64), 8, 7 * 4)


def flux2_klein() -> Twins:
    model = klein_twins.model(double=2, single=3)
    return Twins(klein_twins.diffusers_klein(model), model, text(512, 96), 4, 12 * 2 + 2 * 3)


def krea2() -> Twins:
    """With the text fusion, which the targets select where a user says so."""
    model = krea2_twins.model(3)
    features = text(31, krea2_twins.TEXT_LAYERS * krea2_twins.TEXT_WIDTH)
    return Twins(krea2_twins.diffusers_krea2(model), model, features, 8, 8 * (3 + 4), ("text_fusion.*_blocks.*",))


@pytest.fixture(scope="module", params=[z_image, flux2_klein, krea2], ids=lambda make: make.__name__)
def pair(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Twins:
    return request.param()


@pytest.fixture(scope="module")
def adapters(comfyui: ComfyUI, pair: Twins) -> Any:
    """What training leaves: a student whose every weight does something."""
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(pair.model)
    config = denoiser.family.lora_config(RANK, ALPHA)
    config = config.replace(targets=(*config.targets, *pair.targets))
    adapters = comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, teacher="frozen")
    generator = torch.Generator().manual_seed(6)
    values = {key: torch.randn(t.shape, generator=generator) * 0.1 for key, t in adapters.state().items()}
    adapters.load_state("student", values)
    return adapters


@pytest.fixture(scope="module")
def saved(comfyui: ComfyUI, pair: Twins, adapters: Any) -> Path:
    """The file of Save LoRA (D-OPSD); the peft folder lies beside it."""
    folded = comfyui.core("adapters.lora_file").fold_alpha(adapters.state(), adapters.config)
    tensors = {f"transformer.{key}": value for key, value in folded.items()}
    facts = {"dopsd_family": comfyui.module("nodes.comfy_host.denoiser").family_of(pair.model).name}
    lora = comfyui.module("nodes.comfy_host.sockets").TrainedLora(tensors, facts)
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
def noise(comfyui: ComfyUI, pair: Twins) -> Tensor:
    shape = comfyui.module("nodes.comfy_host.denoiser").family_of(pair.model).latent_shape(WIDTH, HEIGHT)
    return torch.randn(1, *shape, generator=torch.manual_seed(SEED))


@pytest.fixture(scope="module")
def students(comfyui: ComfyUI, pair: Twins, adapters: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of the untouched model, and of the student in the trainer."""
    core, condition = comfyui.core("rollout"), comfyui.core("conditioning.encode").Condition(pair.features)
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(pair.model)
    sigmas = denoiser.family.sigmas(pair.steps, WIDTH, HEIGHT)

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


def test_comfyuis_loader_uses_every_key(comfyui: ComfyUI, pair: Twins, saved: Path, students: Any, caplog: Any) -> None:
    graph = {
        "given": give_values(comfyui, ("MODEL", "CONDITIONING"), [pair.model, [[pair.features[None], {}]]]),
        "lora": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["given", 0], "lora_name": saved.name, "strength_model": 1.0},
        },
        "sample": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {
                "model": ["lora", 0], "positive": ["given", 1], "seed": SEED, "steps": 0, "width": WIDTH,
                "height": HEIGHT, "batch_size": 1, "sampler": "euler",
            },
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["sample", 0]}},
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        run = comfyui.execute(graph)
    assert run.status == "success", run.error
    assert "not loaded" not in caplog.text.lower()
    assert sum(len(entries) for entries in run.value("lora").patches.values()) == pair.parts
    latents = pair.model.model.process_latent_in(run.value("sample")["samples"])
    assert_same(latents.reshape(students[0].shape), students)  # without the time axis, where there is one


def test_diffusers(pair: Twins, saved: Path, students: Any, noise: Tensor) -> None:
    pipeline = PIPELINES[pair.family](pair)
    inputs: dict[str, Any] = {"prompt_embeds": pair.features[None], "latents": noise}
    if pair.family == "z_image":
        inputs["prompt_embeds"] = [pair.features]
    if pair.family == "krea2":
        inputs = {
            "prompt_embeds": pair.features.unflatten(-1, (krea2_twins.TEXT_LAYERS, -1))[None],
            "prompt_embeds_mask": torch.ones(1, len(pair.features), dtype=torch.bool),
            "latents": pipeline._pack_latents(noise, *noise.shape),
        }
    pipeline.load_lora_weights(str(saved.parent), weight_name=saved.name)
    try:
        latents = pipeline(
            **inputs, width=WIDTH, height=HEIGHT, num_inference_steps=pair.steps, guidance_scale=0.0,
            output_type="latent",
        ).images  # fmt: skip
    finally:
        pipeline.unload_lora_weights()
    if pair.family == "flux2_klein":
        latents = klein_twins.in_model_space(pipeline, latents)
    elif pair.family == "krea2":
        latents = pipeline._unpack_latents(latents, HEIGHT, WIDTH).squeeze(2)
    assert_same(latents, students)


def z_image_pipeline(pair: Twins) -> Any:
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    nothing: Any = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = ZImagePipeline(scheduler, nothing, nothing, nothing, pair.network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def klein_pipeline(pair: Twins) -> Any:
    return klein_twins.pipeline(pair.network, klein_twins.vaes()[1])


def krea2_pipeline(pair: Twins) -> Any:
    return krea2_twins.pipeline(pair.network, krea2_twins.vaes()[1])


PIPELINES = {"z_image": z_image_pipeline, "flux2_klein": klein_pipeline, "krea2": krea2_pipeline}


def test_peft(comfyui: ComfyUI, pair: Twins, saved: Path, students: Any, noise: Tensor) -> None:
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(pair.network), str(saved.with_name(f"{saved.stem}peft")))
    x, family = noise, comfyui.module("nodes.comfy_host.denoiser").family_of(pair.model)
    with torch.no_grad():
        for sigma, following in pairwise(family.sigmas(pair.steps, WIDTH, HEIGHT)):
            x = x + (following - sigma) * pair.velocity(loaded, x, sigma)
    assert_same(x, students)
