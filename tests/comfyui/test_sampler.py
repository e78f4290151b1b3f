"""Few-Step Sampler is KSampler on Z-Image's grid, and SamplerCustom with Flux2Scheduler on FLUX.2-klein's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from inprocess import ComfyUI
from torch import Tensor

LOAD = {"class_type": "DOPSD_LoadDemoModels", "inputs": {}}
TEXT = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "a [V] badge, top"}}
STOCK_SAMPLERS = {"euler": "euler", "template": "res_multistep"}


def few_step(**inputs: Any) -> dict:
    values = {
        "model": ["demo", 0], "positive": ["text", 0], "seed": 3, "steps": 4, "width": 64, "height": 64,
        "batch_size": 2, "sampler": "euler",
    }  # fmt: skip
    return {"class_type": "DOPSD_FewStepSampler", "inputs": {**values, **inputs}}


def shown(*nodes: str) -> dict:
    return {f"show {node}": {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}} for node in nodes}


def klein() -> Any:
    """A small FLUX.2-klein as a MODEL."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Flux2(
        {
            "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": 1, "mlp_ratio": 3.0, "theta": 2000,
            "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
            "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "in_channels": 128,
            "hidden_size": 128, "context_in_dim": 192, "patch_size": 1, "vec_in_dim": None, "depth": 1,
            "depth_single_blocks": 2, "guidance_embed": False, "yak_mlp": False, "txt_norm": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    toy.fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(a.std() > 0.01) and torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("sampler", ["euler", "template"])
def test_it_is_ksampler(comfyui: ComfyUI, sampler: str, steps: int):
    empty = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 2}}
    stock = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["demo", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0],
            "seed": 3, "steps": steps, "cfg": 1.0, "sampler_name": STOCK_SAMPLERS[sampler], "scheduler": "simple",
            "denoise": 1.0,
        },
    }  # fmt: skip
    ours = few_step(steps=steps, width=96, sampler=sampler)
    graph = {"demo": LOAD, "text": TEXT, "empty": empty, "stock": stock, "ours": ours, **shown("stock", "ours")}
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    assert close(run.value("ours")["samples"], run.value("stock")["samples"])
    assert run.value("ours", 1).shape == (steps + 1,)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_steps_0_are_the_models_own(comfyui: ComfyUI, seed: int):
    graph = {"demo": LOAD, "text": TEXT, "0": few_step(steps=0, seed=seed), "4": few_step(steps=4, seed=seed)}
    run = comfyui.execute({**graph, **shown("0", "4")})
    assert run.status == "success", run.error
    assert run.value("0", 1).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert torch.equal(run.value("0")["samples"], run.value("4")["samples"])
    assert run.of("progress", "0")[-1].data["value"] == run.of("progress", "0")[-1].data["max"] == 4


def test_steps_0_of_z_image_turbo_are_8(comfyui: ComfyUI):
    node = comfyui.module("nodes.sampler").FewStepSampler
    with torch.inference_mode():
        positive = [[torch.zeros(1, 9, 64), {}]]
        _, sigmas = _result(comfyui, node, toy.z_image(), positive, 0, 0, 64, 64, 1, "euler")
    expected = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]
    assert sigmas.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "template"])
def test_it_is_sampler_custom_with_flux2_scheduler(comfyui: ComfyUI, sampler: str):
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_flux import Flux2Scheduler

    model = klein()
    with torch.inference_mode():
        positive = [[torch.randn(1, 512, 192, generator=torch.Generator().manual_seed(0)), {}]]
        node = comfyui.module("nodes.sampler").FewStepSampler
        latent, sigmas = _result(comfyui, node, model, positive, 5, 0, 96, 64, 1, sampler)
        stock_sigmas = Flux2Scheduler.execute(4, 96, 64).result[0]
        zeros = torch.zeros(1, 128, 4, 6)
        euler, noise = comfy.samplers.sampler_object("euler"), comfy.sample.prepare_noise(zeros, 5)
        stock = comfyui.call(
            _no_grad, comfy.sample.sample_custom, model, noise, 1.0, euler, stock_sigmas, positive, positive, zeros,
            disable_pbar=True, seed=5,
        )  # fmt: skip
    assert torch.allclose(sigmas, stock_sigmas, atol=1e-6)
    assert latent["samples"].shape == zeros.shape and latent["samples"].std() > 0.01
    assert torch.allclose(latent["samples"], stock, atol=1e-5)


def _result(comfyui: ComfyUI, node: Any, *inputs: Any) -> Any:
    import comfy.utils

    hook = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(None)  # it wants a running graph
    try:
        return comfyui.call(_no_grad, node.execute, *inputs).result
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)


def _no_grad(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode():
        return function(*args, **kwargs)


def test_a_wrong_size_is_one_sentence(comfyui: ComfyUI):
    run = comfyui.execute({"demo": LOAD, "text": TEXT, "ours": few_step(width=72), **shown("ours")})
    assert run.status == "error" and "multiples of 16 pixels, got 72x64" in run.error


def test_other_models_are_refused(comfyui: ComfyUI):
    other = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace()))
    node = comfyui.module("nodes.sampler").FewStepSampler
    with pytest.raises(ValueError, match="Z-Image-Turbo and FLUX.2-klein"):
        node.execute(other, [], 0, 0, 64, 64, 1, "euler")


def test_it_can_be_interrupted(comfyui: ComfyUI):
    def stop(event: Any) -> None:
        if event.kind == "progress":
            comfyui.interrupt()

    graph = {"demo": LOAD, "text": TEXT, "ours": few_step(steps=64), **shown("ours")}
    run = comfyui.execute(graph, on_event=stop)
    assert run.status == "interrupted" and run.of("progress", "ours")[-1].data["value"] < 64
