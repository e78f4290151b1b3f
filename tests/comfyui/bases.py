"""Base weights in every form that users have them in, and what a test does with them: train, take gradients, sample.

The files are small (stock_files.py) and come through UNETLoader; conditions are random features, so no encoder runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gradient import checkpointed
from graphs import node_of, shipped
from inprocess import ON_CARD, ComfyUI
from loras import give_values
from runs import Run
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """file: below diffusion_models. weights: the dtype of a block's weights or, on a GPU, what they are computed in;
    the layout of quantised ones. flag: ComfyUI's flag that asks for it, else it follows from the file."""

    file: str
    weights: Any
    flag: str = ""


FORMS: Mapping[str, Form] = {
    "fp32": Form("z_image_turbo_bf16", torch.float32, "fp32_unet"),
    "bf16": Form("z_image_turbo_bf16", torch.bfloat16, "bf16_unet"),
    "fp16": Form("z_image_turbo_bf16", torch.float16, "fp16_unet"),
    "fp8": Form("z_image_turbo_fp8_scaled", "TensorCoreFP8E4M3Layout"),
    "fp8, older layout": Form("z_image_turbo_fp8_scaled_old", "TensorCoreFP8E4M3Layout"),
    "int8": Form("z_image_turbo_int8", "TensorWiseINT8Layout"),
    "int8 convrot": Form("z_image_turbo_int8_convrot", "TensorWiseINT8Layout"),
    "klein": Form("flux-2-klein-4b", torch.float32, "fp32_unet"),
    "klein bf16": Form("flux-2-klein-4b", torch.bfloat16, "bf16_unet"),
    "klein fp16": Form("flux-2-klein-4b", torch.float16, "fp16_unet"),
    "klein fp8": Form("flux-2-klein-4b-fp8", "TensorCoreFP8E4M3Layout"),
    "krea 2": Form("krea2_turbo_bf16", torch.float32, "fp32_unet"),
    "krea 2 bf16": Form("krea2_turbo_bf16", torch.bfloat16, "bf16_unet"),
    "krea 2 fp16": Form("krea2_turbo_bf16", torch.float16, "fp16_unet"),
    "krea 2 fp8": Form("krea2_turbo_fp8_scaled", "TensorCoreFP8E4M3Layout"),
    "krea 2 int8 convrot": Form("krea2_turbo_int8_convrot", "TensorWiseINT8Layout"),
}
CENTRAL = ("bf16", "fp8", "int8 convrot", "klein", "klein fp8")
"""Those that differ most; the modes of less use are run with these alone (`-m central`)."""
OFTEN = (*CENTRAL, "krea 2 fp8")


def variants(forms: Iterable[str]) -> list[Any]:
    """Parameters of a test: the central ones, one of Krea 2, and the others where `make test-all` asks for them."""
    marks = {
        form: [pytest.mark.central] if form in CENTRAL else [pytest.mark.long] * (form not in OFTEN) for form in forms
    }
    return [pytest.param(form, marks=found) for form, found in marks.items()]


EVERY_FORM = variants(FORMS)

SETTINGS = {
    "preset": "standard",  # all rollout steps, so that losses compare
    "steps": 3, "rank": 4, "rollout_steps": 2, "preview_every": 0, "probe_every": 0, "anchor_probability": 0.0,
}  # fmt: skip
SIGMA = 0.7

Load = Callable[[str], Any]
Between = Callable[[Any, Tensor, Any, Any], None]


@pytest.fixture
def load(comfyui: ComfyUI, stock: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Load:
    """load(form): the MODEL as UNETLoader gives it, in the executor's thread and inference mode."""
    from comfy.cli_args import args

    def loaded(name: str) -> Any:
        form = FORMS[name]
        stock(f"diffusion_models/{form.file}")
        for flag in ("fp32_unet", "bf16_unet", "fp16_unet"):
            monkeypatch.setattr(args, flag, flag == form.flag)
        unet = torch.inference_mode()(comfyui.nodes.UNETLoader().load_unet)
        (model,) = comfyui.call(unet, f"{form.file}.safetensors", "default")
        assert form.weights in (form_of(model), model.model.get_dtype_inference())
        return model

    return loaded


def form_of(model: Any) -> Any:
    """The dtype of a block's weights, or the layout of quantised ones."""
    from comfy.quant_ops import QuantizedTensor

    network = model.model.diffusion_model
    names = {"layers": "attention.qkv", "single_blocks": "linear1", "blocks": "attn.wq"}
    (linear,) = [
        getattr(network, name)[0].get_submodule(path) for name, path in names.items() if hasattr(network, name)
    ]
    weight = linear.weight
    return weight._layout_cls if isinstance(weight, QuantizedTensor) else weight.dtype


# -- what is done with them -------------------------------------------------------------------------------------------


def made_conditions(comfyui: ComfyUI, model: Any) -> Any:
    """Two pairs whose teacher knows more than the student."""
    conditioning, family = (
        comfyui.core("conditioning.encode"),
        comfyui.module("nodes.comfy_host.denoiser").family_of(model),
    )
    width = comfyui.module("nodes.comfy_host.fits").text_width(model)
    generator, pairs = torch.Generator().manual_seed(3), []
    for number in range(2):
        student, teacher = (torch.randn(length, width, generator=generator) for length in (11, 20))
        latent = torch.randn(family.latent_shape(64, 64), generator=generator)
        pairs.append(
            conditioning.DualCondition(
                conditioning.Condition(student), conditioning.Condition(teacher), latent, f"{number}", f"{number}"
            )
        )
    data, teacher = comfyui.core("training.training_set").TrainingSet(pairs), comfyui.core("conditioning.teachers").VLM
    return comfyui.module("nodes.comfy_host.sockets").Conditions(family, teacher, data, (), (), "", 0.0)


def train(comfyui: ComfyUI, model: Any, name: str, **settings: Any) -> Run:
    """A short D-OPSD Train LoRA on this MODEL."""
    workflow = shipped("z_image_turbo_train")
    inputs = {**workflow[node_of(workflow, "DOPSD_TrainLoRA")]["inputs"], **SETTINGS, "run_name": name, **settings}
    del inputs["vae"]
    given = give_values(comfyui, ("MODEL", "DOPSD_CONDITIONS"), [model, made_conditions(comfyui, model)])
    inputs |= {"model": ["given", 0], "conditions": ["given", 1]}
    run = comfyui.execute({"given": given, "train": {"class_type": "DOPSD_TrainLoRA", "inputs": inputs}})
    assert run.status == "success", run.error
    return run


def gradients(comfyui: ComfyUI, model: Any, count: int = 0, between: Between | None = None) -> list[Tensor]:
    """Of a LoRA whose every weight does something, on the CPU; called as a node is: inside inference mode.

    count: of the blocks that recompute, or `SELECTIVE`. between: called before the backward with the denoiser, x, the
    pairs and the adapters.
    """

    def computed() -> list[Tensor]:
        conditions, denoiser = (
            made_conditions(comfyui, model),
            comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model),
        )
        pairs, generator = conditions.data.pairs, torch.Generator().manual_seed(4)
        x = torch.randn(2, *pairs[0].target_latent.shape, generator=generator).to(denoiser.device)
        with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(x.shape):
            adapters = drawn_adapters(comfyui, denoiser, generator)
            with adapters.attached(), checkpointed(comfyui, denoiser, count):
                out = denoiser.predict_x0(x, SIGMA, [pair.student for pair in pairs])
                if between is not None:
                    between(denoiser, x, pairs, adapters)
                scale = 2.0**14 if denoiser.compute_dtype == torch.float16 else 1.0  # or small gradients become 0
                (out.square().mean() * scale).backward()
        return [parameter.grad.cpu() / scale for parameter in adapters.parameters()]

    return comfyui.call(computed)


def drawn_adapters(comfyui: ComfyUI, denoiser: Any, generator: torch.Generator) -> Any:
    """A student that is not the base."""
    lora = denoiser.family.lora_config(4)
    adapters = comfyui.core("adapters.adapter_set").AdapterSet(
        denoiser.sites(), lora, teacher="frozen", device=denoiser.device
    )
    values = {key: torch.randn(v.shape, generator=generator) * 0.05 for key, v in adapters.state().items()}
    adapters.load_state("student", values)
    return adapters


def drawn(comfyui: ComfyUI, model: Any) -> Tensor:
    """A latent in two steps, by ComfyUI's sampler."""
    conditions = made_conditions(comfyui, model)
    family, features = conditions.family, conditions.data.pairs[0].student.features
    latent = torch.zeros(1, *family.latent_shape(64, 64))
    sample = torch.inference_mode()(comfyui.module("nodes.comfy_host.sampling").few_step_sample)
    return comfyui.call(sample, model, [[features[None], {}]], latent, 3, family.sigmas(2, 64, 64), "euler")


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, bytes instead of 8-bit floats."""
    with torch.inference_mode():
        values = model.model.state_dict()
        return {k: (v.view(torch.uint8) if v.dtype.itemsize == 1 else v).cpu().clone() for k, v in values.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """To the bit, or on a real GPU within its own noise."""
    ones, others = list(one), list(other)
    if ON_CARD:
        return relative(ones, others) < 0.01
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def relative(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The distance of two lists of tensors over the length of the second."""
    a, b = (torch.cat([value.flatten() for value in values]) for values in (one, other))
    return float((a - b).norm() / b.norm())


def learned(run: Run) -> list[Tensor]:
    """B, which was 0."""
    return [value for key, value in sorted(run.value("train").items()) if ".lora_B." in key]


# -- where they are ---------------------------------------------------------------------------------------------------


def is_dynamic() -> bool:
    """Whether ComfyUI's dynamic VRAM is on, which decides itself where weights are."""
    import comfy.memory_management

    return comfy.memory_management.aimdo_enabled


@contextmanager
def resident(comfyui: ComfyUI, share: float) -> Iterator[None]:
    """Inside, ComfyUI's classic patcher loads models as on a card with room for this share of their weights."""
    import comfy.model_management

    loaded_model = comfy.model_management.LoadedModel
    load_all = loaded_model.model_load

    def load_part(self: Any, _: float = 0, **options: Any) -> Any:
        room = 0 if share >= 1 else max(self.model_memory() * share - self.model_loaded_memory(), 0.1)
        return load_all(self, room, **options)

    unload(comfyui)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded_model, "model_load", load_part)
        yield
    unload(comfyui)


@pytest.fixture
def half_in_ram(comfyui: ComfyUI) -> Iterator[Callable[[], None]]:
    """Once called, half of the weights of what ComfyUI loads stay in RAM."""
    room = resident(comfyui, 0.5)
    entered: list[None] = []
    yield lambda: entered.append(room.__enter__())
    if entered:
        room.__exit__(None, None, None)


def unload(comfyui: ComfyUI) -> None:
    import comfy.model_management

    comfyui.call(torch.inference_mode()(comfy.model_management.unload_all_models))


def left_in_ram(model: Any) -> list[str]:
    """The modules whose weights are brought for each use."""
    return [name for name, module in model.model.named_modules() if hasattr(module, "prev_comfy_cast_weights")]
