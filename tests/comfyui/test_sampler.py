"""Few-Step Sampler is KSampler on Z-Image's grid, and the graph of ComfyUI's own workflows for FLUX.2-klein."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
import twins
from inprocess import ComfyUI
from loras import give_values
from runs import Run
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


def test_all_of_a_conditioning_counts_as_in_ksampler(comfyui: ComfyUI):
    """Areas, strengths, ranges of time and several prompts; and guidance functions of the MODEL."""
    area = {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 0.8, "conditioning": ["text", 0]}
    span = {"start": 0.0, "end": 0.6, "conditioning": ["area", 0]}
    other = {"clip": ["demo", 1], "text": "a badge, bottom, on a navy background"}
    graph = {
        "demo": LOAD,
        "text": TEXT,
        "area": {"class_type": "ConditioningSetAreaPercentage", "inputs": area},
        "span": {"class_type": "ConditioningSetTimestepRange", "inputs": span},
        "other": {"class_type": "CLIPTextEncode", "inputs": other},
        "both": {
            "class_type": "ConditioningCombine",
            "inputs": {"conditioning_1": ["span", 0], "conditioning_2": ["other", 0]},
        },
        "guided": {"class_type": "CFGNorm", "inputs": {"model": ["demo", 0], "strength": 0.7}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "stock": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["guided", 0], "positive": ["both", 0], "negative": ["text", 0], "latent_image": ["empty", 0],
                "seed": 3, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "ours": few_step(model=["guided", 0], positive=["both", 0]),
        "plain": few_step(positive=["other", 0]),
    }  # fmt: skip
    run = comfyui.execute({**graph, **shown("stock", "ours", "plain")})
    assert run.status == "success", run.error
    assert close(run.value("ours")["samples"], run.value("stock")["samples"])
    assert not close(run.value("ours")["samples"], run.value("plain")["samples"])


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_steps_0_are_the_models_own(comfyui: ComfyUI, seed: int):
    graph = {"demo": LOAD, "text": TEXT, "0": few_step(steps=0, seed=seed), "2": few_step(steps=2, seed=seed)}
    run = comfyui.execute({**graph, **shown("0", "2")})
    assert run.status == "success", run.error
    assert run.value("0", 1).tolist() == pytest.approx([1.0, 0.75, 0.0])
    assert torch.equal(run.value("0")["samples"], run.value("2")["samples"])
    assert run.of("progress", "0")[-1].data["value"] == run.of("progress", "0")[-1].data["max"] == 2


def test_steps_0_of_z_image_turbo_are_8(comfyui: ComfyUI):
    node = comfyui.module("nodes.few_step_sampler").FewStepSampler
    with torch.inference_mode():
        positive = [[torch.zeros(1, 9, 64), {}]]
        _, sigmas = _result(comfyui, node, toy.z_image(), positive, 0, 0, 64, 64, 1, "euler")
    expected = [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]
    assert sigmas.tolist() == pytest.approx(expected, abs=1e-6)


@dataclass(frozen=True)
class Wanted:
    """What a klein graph draws: its size, how many, in how many steps, by which sampler of ours, and after which
    references (width, height)."""

    width: int = 64
    height: int = 64
    batch_size: int = 1
    steps: int = 0
    sampler: str = "euler"
    references: tuple[tuple[int, int], ...] = ()


CASES = {
    "square": Wanted(),
    "wide": Wanted(width=112, height=80),
    "tall, by the template's sampler": Wanted(width=48, height=256, sampler="template"),
    "large": Wanted(width=512, height=288),
    "batch": Wanted(width=96, batch_size=2),
    "other steps": Wanted(width=80, steps=7),
    "edit": Wanted(width=80, references=((80, 64),)),
    "edit of several": Wanted(width=80, height=96, references=((48, 112), (64, 64)), sampler="template"),
    "batch of edits": Wanted(batch_size=2, references=((96, 48),)),
}


@pytest.mark.parametrize("wanted", CASES.values(), ids=list(CASES))
def test_it_is_kleins_template(comfyui: ComfyUI, wanted: Wanted):
    """Flux2Scheduler, CFGGuider at 1 with an emptied negative and SamplerCustomAdvanced, run by ComfyUI's executor."""
    run = drawn(comfyui, wanted)
    assert torch.allclose(run.value("ours", 1), run.value("sigmas"), atol=1e-6)
    assert run.value("ours")["samples"].shape[1:] == (128, wanted.height // 16, wanted.width // 16)
    assert twins.relative(run.value("ours")["samples"], run.value("stock")["samples"]) < 1e-5


def test_references_are_seen(comfyui: ComfyUI):
    """The equalities above are not of images that ignore them, or in what shape they come."""
    cases = [Wanted(), Wanted(references=((80, 64),)), Wanted(references=((64, 80),))]
    latents = [drawn(comfyui, wanted).value("ours")["samples"] for wanted in cases]
    assert all(twins.relative(a, b) > 3e-4 for a, b in pairwise(latents))


def drawn(comfyui: ComfyUI, wanted: Wanted) -> Run:
    """The image by nodes "stock" and "ours"."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 512, 192, generator=generator)
    seen = [{"samples": torch.randn(1, 128, h // 16, w // 16, generator=generator)} for w, h in wanted.references]
    kinds = ("MODEL", "CONDITIONING", *("LATENT" for _ in seen))
    graph = {"given": give_values(comfyui, kinds, [toy.flux2(), [[text, {}]], *seen]), **kleins_template(wanted)}
    graph["ours"] = few_step(
        model=["given", 0], positive=graph["guider"]["inputs"]["positive"], seed=5, steps=wanted.steps,
        width=wanted.width, height=wanted.height, batch_size=wanted.batch_size, sampler=wanted.sampler,
    )  # fmt: skip
    run = comfyui.execute({**graph, **shown("stock", "ours")})
    assert run.status == "success", run.error
    return run


def kleins_template(wanted: Wanted) -> dict:
    said, negative, graph = ["given", 1], ["zero", 0], {}
    graph["zero"] = node("ConditioningZeroOut", conditioning=["given", 1])
    for i in range(len(wanted.references)):  # on the positive and the negative
        latent = ["given", 2 + i]
        graph[f"reference{i}"] = node("ReferenceLatent", conditioning=said, latent=latent)
        graph[f"zeroed{i}"] = node("ReferenceLatent", conditioning=negative, latent=latent)
        said, negative = [f"reference{i}", 0], [f"zeroed{i}", 0]
    size = {"width": wanted.width, "height": wanted.height}
    return {
        **graph,
        "empty": node("EmptyFlux2LatentImage", batch_size=wanted.batch_size, **size),
        "sigmas": node("Flux2Scheduler", steps=wanted.steps or 4, **size),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "guider": node("CFGGuider", model=["given", 0], positive=said, negative=negative, cfg=1.0),
        "noise": node("RandomNoise", noise_seed=5),
        "stock": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
            sigmas=["sigmas", 0], latent_image=["empty", 0],
        ),
    }  # fmt: skip


def node(kind: str, **inputs: Any) -> dict:
    return {"class_type": kind, "inputs": inputs}


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
    other = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace()), model_options={})
    node = comfyui.module("nodes.few_step_sampler").FewStepSampler
    with pytest.raises(ValueError, match="Z-Image-Turbo, FLUX.2-klein and Krea 2 Turbo"):
        node.execute(other, [[torch.zeros(1, 1, 1), {}]], 0, 0, 64, 64, 1, "euler")


def test_it_can_be_interrupted(comfyui: ComfyUI):
    def stop(event: Any) -> None:
        if event.kind == "progress":
            comfyui.interrupt()

    graph = {"demo": LOAD, "text": TEXT, "ours": few_step(steps=64), **shown("ours")}
    run = comfyui.execute(graph, on_event=stop)
    assert run.status == "interrupted" and run.of("progress", "ours")[-1].data["value"] < 64
