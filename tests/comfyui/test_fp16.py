"""Training where ComfyUI computes in fp16: on cards without bf16, with --fp16-unet, or by the node ModelComputeDtype.

On a CPU it is the node that brings it about. The gradients come through the trainer's own steps, at the size at which
those of a mean over the latent are too small for fp16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from bases import equal
from graphs import node_of, shipped
from inprocess import ComfyUI
from loras import give_values
from runs import Run
from torch import Tensor

FILES = {"z_image": "z_image_turbo_bf16", "flux2_klein": "flux-2-klein-4b"}
FORMS = (*FILES.values(), "z_image_turbo_fp8_scaled", "z_image_turbo_int8", "flux-2-klein-4b-fp8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = {
    "preset": "standard",  # all rollout steps, so that losses compare
    "steps": 4, "rank": 4, "rollout_steps": 2, "preview_every": 0, "probe_every": 2, "anchor_probability": 0.0,
    "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture
def load(comfyui: ComfyUI, stock: Callable[..., None]) -> Callable[..., Any]:
    """load(file, dtype): the MODEL as UNETLoader gives it, through ModelComputeDtype."""

    def loaded(file: str, dtype: str = "fp32") -> Any:
        stock(f"diffusion_models/{file}")
        unet = torch.inference_mode()(comfyui.nodes.UNETLoader().load_unet)
        (model,) = comfyui.call(unet, f"{file}.safetensors", "default")
        return comfyui.nodes.NODE_CLASS_MAPPINGS["ModelComputeDtype"]().patch(model, dtype)[0]

    return loaded


def width(family: Any) -> int:
    return 64 if family.name == "z_image" else 192


def one_pair(comfyui: ComfyUI, family: Any, side: int) -> Any:
    """A training set of one pair, whose teacher reads what the student reads."""
    conditioning, generator = comfyui.core("conditioning.encode"), torch.Generator().manual_seed(0)
    condition = conditioning.Condition(torch.randn(40, width(family), generator=generator))
    latent = torch.randn(family.latent_shape(side, side), generator=generator)
    return comfyui.core("training.training_set").TrainingSet(
        [conditioning.DualCondition(condition, condition, latent, "", "")]
    )


def gradient(comfyui: ComfyUI, model: Any, side: int, gap: float, folder: Path) -> Tensor:
    """Of one optimizer step, made by the trainer, towards a teacher that is `gap` away in x0."""
    host = comfyui.module("nodes.comfy_host.denoiser")

    class FarTeacher(host.ComfyDenoiser):
        def predict_x0(self, x: Tensor, sigma: float, conditions: Any) -> Tensor:
            x0 = super().predict_x0(x, sigma, conditions)
            away = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
            return x0 if torch.is_grad_enabled() else x0 + gap * away.to(x0.device)

    denoiser = FarTeacher(model)
    family = denoiser.family
    config = comfyui.core("config").TrainConfig(
        adapter=family.lora_config(8, 8.0), family=family.name, teacher="same", rollout_steps=1, max_grad_norm=0.0,
        objective=comfyui.core("objectives").DOPSD(anchor_probability=0.0),
    )  # fmt: skip
    start, data = twins.random_student(comfyui, model, 8), one_pair(comfyui, family, side)
    shape = (1, *data.pairs[0].target_latent.shape)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(shape):
        run = comfyui.core("training.run").Run(config, denoiser, data, folder)
        run.adapters.load_state("student", start)
        with run.adapters.attached():
            run.gradients.accumulate(run.step, run.optimizer)
        return torch.cat([value.flatten() for value in twins._gradients(run.adapters).values()])


@pytest.mark.parametrize(("side", "gap"), [pytest.param(768, 0.03, marks=pytest.mark.long), (256, 0.1), (256, 0.3)])
@pytest.mark.parametrize("family", FILES)
def test_gradients_are_those_of_fp32(
    comfyui: ComfyUI, load: Any, tmp_path: Path, family: str, side: int, gap: float
) -> None:
    plain, half = (
        comfyui.call(gradient, comfyui, load(FILES[family], dtype), side, gap, tmp_path) for dtype in ("fp32", "fp16")
    )
    assert twins.relative(half, plain) < 0.02
    assert (half == 0).float().mean() < 0.01


# -- where it is fp16 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", FORMS)
def test_the_compute_dtype_is_what_linears_are_given(comfyui: ComfyUI, load: Any, file: str, dtype: str) -> None:
    """Known before the MODEL is loaded, from whatever its weights are stored in."""
    model = load(file, dtype)
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
    seen: set[torch.dtype] = set()
    linears = [module for block in denoiser.blocks() for module in block.modules() if hasattr(module, "in_features")]
    handles = [m.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype)) for m in linears]
    before = denoiser.compute_dtype
    data = one_pair(comfyui, denoiser.family, 64)
    x = torch.randn(1, *data.pairs[0].target_latent.shape)

    def predict() -> torch.dtype:
        with torch.inference_mode(), denoiser.loaded(x.shape):
            here = x.to(denoiser.device)
            denoiser.predict_x0(here, 0.7, [data.pairs[0].student.to(denoiser.device)])
            return denoiser.compute_dtype

    try:
        assert comfyui.call(predict) == before == DTYPES[dtype]
    finally:
        for handle in handles:
            handle.remove()
    modulation = {torch.float32} if denoiser.family.name == "z_image" else set()  # of the time, which stays fp32
    assert seen - modulation == {before} - modulation


# -- D-OPSD Train LoRA -------------------------------------------------------------------------------------------------


def train(comfyui: ComfyUI, model: Any, name: str, **settings: Any) -> Run:
    conditioning, generator = comfyui.core("conditioning.encode"), torch.Generator().manual_seed(3)
    family = comfyui.module("nodes.comfy_host.denoiser").family_of(model)
    pairs = [
        conditioning.DualCondition(
            *(conditioning.Condition(torch.randn(n, width(family), generator=generator)) for n in (11, 20)),
            torch.randn(family.latent_shape(64, 64), generator=generator), str(number), str(number),
        )
        for number in range(2)
    ]  # fmt: skip
    data, teacher = comfyui.core("training.training_set").TrainingSet(pairs), comfyui.core("conditioning.teachers").VLM
    conditions = comfyui.module("nodes.comfy_host.sockets").Conditions(family, teacher, data, (), (), "", 0.0)
    workflow = shipped("z_image_turbo_train")
    inputs = {**workflow[node_of(workflow, "DOPSD_TrainLoRA")]["inputs"], **SETTINGS, **settings, "run_name": name}
    del inputs["vae"]
    given = give_values(comfyui, ("MODEL", "DOPSD_CONDITIONS"), [model, conditions])
    inputs |= {"model": ["given", 0], "conditions": ["given", 1]}
    return comfyui.execute({"given": given, "train": {"class_type": "DOPSD_TrainLoRA", "inputs": inputs}})


def learned(run: Run) -> Tensor:
    """B, which was 0."""
    assert run.status == "success", run.error
    return torch.cat([value.flatten() for key, value in sorted(run.value("train").items()) if ".lora_B." in key])


def rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in (Path(run.value("train", 2)) / "train.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("family", FILES)
def test_a_training_goes_where_it_goes_in_fp32(comfyui: ComfyUI, load: Any, family: str) -> None:
    plain = train(comfyui, load(FILES[family], "fp32"), f"fp32-{family}")
    half = train(comfyui, load(FILES[family], "fp16"), f"fp16-{family}")
    assert torch.cosine_similarity(learned(half), learned(plain), dim=0) > 0.98
    assert all("loss_scale" not in row for row in rows(plain))
    steps = [row for row in rows(half) if row["step"]]
    assert all(row["loss_scale"] >= 1.0 and row["overflows"] == 0 for row in steps) and len(steps) == 4
    assert steps[-1]["relative_gap"] == pytest.approx(rows(plain)[-1]["relative_gap"], rel=0.05)


@pytest.mark.long
def test_it_is_resumed_bit_identically(comfyui: ComfyUI, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui.core("training.loss_scale"), "GROWTH_INTERVAL", 2)
    monkeypatch.setattr(comfyui.core("training.loss_scale"), "INITIAL", 2.0**23)  # overflows
    model = load(FILES["flux2_klein"], "fp16")
    whole = train(comfyui, model, "fp16-whole", probe_every=0)
    for steps in (1, 3, 4):
        cut = train(comfyui, model, "fp16-cut", steps=steps, probe_every=0)
    assert equal([learned(cut)], [learned(whole)])
    scales = [(row["loss_scale"], row["overflows"]) for row in rows(whole) if row["step"]]
    assert scales == [(row["loss_scale"], row["overflows"]) for row in rows(cut) if row["step"]]
    assert scales[0][1] > 0 and scales[2][0] < scales[3][0], "it overflowed, and grew again"


@pytest.mark.long
def test_a_network_that_overflows_in_fp16_is_one_sentence(
    comfyui: ComfyUI, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every scale, of which there are few here."""
    monkeypatch.setattr(comfyui.core("training.loss_scale"), "INITIAL", 4.0)
    model = load(FILES["flux2_klein"], "fp16")
    shape = tuple(model.model.diffusion_model.img_in.weight.shape)
    model.patches["diffusion_model.img_in.weight"] = [(1.0, ("diff", (torch.full(shape, 1e5),)), 1.0, None, None)]
    run = train(comfyui, model, "fp16-overflow")
    assert run.status == "error" and "\n" not in run.error
    assert "overflows in fp16; load the model in bf16 or fp32" in run.error and "ModelComputeDtype" in run.error
