"""Training goes on from LoRAs of any trainer with exactly the effect that ComfyUI's own loader gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from graphs import training
from inprocess import ComfyUI
from loras import demo_lora, give, give_values
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 10.0
RUN_RANK, RUN_ALPHA = 14, 7.0
SHAPE = (1, 16, 10, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return twins.as_model(twins.diffusers_z_image())


def linears(model: Any, native: bool) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every Linear of the blocks under the original or diffusers' names; no line of ours."""
    from comfy.utils import z_image_to_diffusers

    weights = {k.removesuffix(".weight"): v.shape for k, v in model.model.diffusion_model.state_dict().items()}
    kinds = (".attention.qkv", ".attention.out", ".feed_forward.w1", ".feed_forward.w2", ".feed_forward.w3")
    own = {name: tuple(shape) for name, shape in weights.items() if name.endswith(kinds)}
    if native:
        return own
    table = z_image_to_diffusers(model.model.model_config.unet_config)
    found = {}
    for name, target in table.items():
        key, rows = (target, None) if isinstance(target, str) else (target[0], target[1][2])
        if (key := key.removesuffix(".weight")) in own and name.endswith(".weight"):
            found[name.removesuffix(".weight")] = (rows or own[key][0], own[key][1])
    return found


def random_file(
    model: Any, native: bool, named: Callable[[str], str], down: str, up: str, alpha: float | None = None
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    file = {}
    for name, (rows, columns) in sorted(linears(model, native).items()):
        file[named(name) + down] = torch.randn(RANK, columns, generator=generator) * 0.1
        file[named(name) + up] = torch.randn(rows, RANK, generator=generator) * 0.1
        if alpha is not None:
            file[named(name) + ".alpha"] = torch.tensor(alpha)
    return file


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
FORMATS = {
    "ours and diffusers": (False, dotted("transformer."), *AB),
    "ai-toolkit": (False, dotted("diffusion_model."), *AB),
    "with alpha": (False, dotted("diffusion_model."), *AB, ALPHA),
    "comfyui's trainer": (True, dotted("diffusion_model."), *DOWN_UP, ALPHA),
    "diffusion-pipe": (True, dotted("diffusion_model."), *AB),
    "lora_unet, original names": (True, flat("lora_unet_"), *DOWN_UP, ALPHA),
    "simpletuner": (False, flat("lycoris_"), *DOWN_UP, ALPHA),
}


@pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS.keys())
def test_the_student_starts_as_the_stock_loader_draws(comfyui: ComfyUI, model: Any, made: tuple) -> None:
    assert_same_start(comfyui, model, random_file(model, *made))


def test_musubis_file_before_and_after_its_conversion(comfyui: ComfyUI, model: Any) -> None:
    """Raw, ComfyUI loads none of its attention. Converted, q, k and v are one of three times the rank and alpha."""
    raw = random_file(model, False, flat("lora_unet_"), *DOWN_UP, ALPHA)
    converted = {key.replace("attention_to_out_0", "attention_out"): value for key, value in raw.items()}
    for name in [key.removesuffix("to_q.alpha") for key in raw if key.endswith("to_q.alpha")]:
        three = [[converted.pop(f"{name}to_{x}{kind}") for x in "qkv"] for kind in (*DOWN_UP, ".alpha")]
        converted[f"{name}qkv.lora_down.weight"] = torch.cat(three[0])
        converted[f"{name}qkv.lora_up.weight"] = torch.block_diag(*three[1])
        converted[f"{name}qkv.alpha"] = 3 * three[2][0]
    start = assert_same_start(comfyui, model, converted)
    assert {value.shape[0] for key, value in start.items() if ".lora_A." in key} == {RANK}
    assert_same_start(comfyui, model, raw, as_loaded=converted)


def assert_same_start(
    comfyui: ComfyUI, model: Any, file: dict[str, Tensor], as_loaded: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Through Load LoRA (D-OPSD) and into a new run of another rank and alpha, against LoraLoaderModelOnly."""
    for name, tensors in (("start", file), ("stock", as_loaded or file)):
        (comfyui.output / "loras").mkdir(exist_ok=True)
        save_file(
            {key: value.clone() for key, value in tensors.items()}, comfyui.output / "loras" / f"{name}.safetensors"
        )
    graph = {
        "model": give_values(comfyui, ("MODEL",), [model]),
        "ours": {"class_type": "DOPSD_LoadLoRA", "inputs": {"lora_name": "start.safetensors"}},
        "stock": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["model", 0], "lora_name": "stock.safetensors", "strength_model": 1.0},
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["ours", 0]}},
        "show_stock": {"class_type": "PreviewAny", "inputs": {"source": ["stock", 0]}},
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    host, core = comfyui.module("nodes.host"), comfyui.core
    denoiser = host.ComfyDenoiser(model)
    config = core("config").TrainConfig(lora=denoiser.family.lora_config(RUN_RANK, RUN_ALPHA))
    start = comfyui.module("nodes.initial_lora").start_of(run.value("ours"), denoiser, config)
    assert not start.notes
    adapters = core("adapters").AdapterSet(denoiser.sites(), config.lora, teacher="frozen")
    adapters.load_state("student", core("lora_import").start_state(start.tensors, adapters.state(), config.lora))
    base, stock = predicted(comfyui, model), predicted(comfyui, run.value("stock"))
    with adapters.attached():
        ours = predicted(comfyui, model)
    assert (stock - base).norm() > 0.05 * base.norm()
    assert (ours - stock).norm() < 1e-4 * (stock - base).norm()
    return start.tensors


def predicted(comfyui: ComfyUI, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, features = torch.randn(SHAPE, generator=generator), torch.randn(19, 64, generator=generator)
    condition = comfyui.core("conditioning").Condition(features)
    with torch.inference_mode(), comfyui.module("nodes.host").ComfyDenoiser(model).loaded(SHAPE) as denoiser:
        return denoiser.predict_x0(x, 0.75, [condition])


# -- D-OPSD Train LoRA -------------------------------------------------------------------------------------------------


def with_start(comfyui: ComfyUI, name: str, lora: dict[str, Tensor], **settings: Any) -> dict:
    graph = training(name, preview_every=0, probe_every=0, warmup=0, **settings)
    graph["start"] = give(comfyui, lora)
    graph["train"]["inputs"]["initial_lora"] = ["start", 0]
    return graph


def test_a_run_goes_on_from_the_lora(comfyui: ComfyUI) -> None:
    lora = demo_lora(comfyui, rank=4)
    still = comfyui.execute(with_start(comfyui, "still", lora, steps=1, rank=6, alpha=3.0, learning_rate=1e-9))
    assert still.status == "success", still.error
    out = still.value("train")
    assert out.keys() == lora.keys()
    for name in {key.rsplit(".lora_", 1)[0] for key in lora}:
        before, after = (t[f"{name}.lora_B.weight"].float() @ t[f"{name}.lora_A.weight"].float() for t in (lora, out))
        assert twins.relative(after, before) < 1e-2  # bf16 at most lies between
    assert "left out" not in "".join(still.texts("train"))


def test_the_lora_is_a_setting_of_the_run(comfyui: ComfyUI) -> None:
    loras = [demo_lora(comfyui, rank=4, seed=seed) for seed in (0, 1)]
    runs = [comfyui.execute(with_start(comfyui, "setting", lora, steps=1, rank=4)) for lora in (loras[0], *loras)]
    plain = comfyui.execute(training("setting", preview_every=0, probe_every=0, warmup=0, steps=1, rank=4))
    folders = [Path(run.value("train", 2)).name for run in (*runs, plain)]
    assert folders[0] == folders[1] and len(set(folders)) == 3


def test_what_is_left_out_is_said_on_the_node(comfyui: ComfyUI) -> None:
    lora = {**demo_lora(comfyui, rank=4), "diffusion_model.x_embedder.diff_b": torch.ones(256)}
    run = comfyui.execute(with_start(comfyui, "left_out", lora, steps=1, rank=4))
    assert run.status == "success", run.error
    assert any("1 tensors of initial_lora are not trained" in text for text in run.texts("train"))


@pytest.mark.parametrize(
    ("change", "rank", "sentence"),
    [
        ({}, 3, "the LoRA to start from has rank 4, the run has rank 3; set rank to 4"),
        ({"x.lokr_w1": torch.ones(1)}, 4, "only plain LoRA"),
        ({"transformer.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 3840)}, 4, "of another model"),
    ],
    ids=["rank", "LoKr", "the real model's"],
)
def test_what_does_not_fit_is_one_sentence(comfyui: ComfyUI, change: dict, rank: int, sentence: str) -> None:
    run = comfyui.execute(with_start(comfyui, "refused", {**demo_lora(comfyui, rank=4), **change}, steps=1, rank=rank))
    assert run.status == "error" and sentence in run.error and "\n" not in run.error
    assert not list((comfyui.output / "dopsd").glob("refused-*/checkpoints"))
