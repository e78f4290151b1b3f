"""Base weights in every form that users have them in: whole trainings on 8-bit files, and with weights left in RAM.

The files are small (stock_files.py) and come through UNETLoader; conditions are random features, so no encoder runs.
Weights in RAM are those of ComfyUI's classic partial loading, with all its casts, patches and bookkeeping. On a CPU
they lie where the others do, so no transfer is tested; its dynamic VRAM, which needs CUDA, is not run at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import node_of, shipped
from inprocess import ComfyUI
from loras import give_values, random_lora
from runs import Run
from torch import Tensor

Stock = Callable[..., None]

FORMS = {
    # the file, and what the weights of a block are once they are loaded
    "fp32": ("z_image_turbo_bf16", torch.float32),
    "bf16": ("z_image_turbo_bf16", torch.bfloat16),
    "fp8": ("z_image_turbo_fp8_scaled", "TensorCoreFP8E4M3Layout"),
    "fp8, older layout": ("z_image_turbo_fp8_scaled_old", "TensorCoreFP8E4M3Layout"),
    "int8": ("z_image_turbo_int8", "TensorWiseINT8Layout"),
    "int8 convrot": ("z_image_turbo_int8_convrot", "TensorWiseINT8Layout"),
    "klein": ("flux-2-klein-4b", torch.float32),
    "klein fp8": ("flux-2-klein-4b-fp8", "TensorCoreFP8E4M3Layout"),
}
SETTINGS = {
    "steps": 3, "rank": 4, "rollout_steps": 2, "preview_every": 0, "probe_every": 0, "anchor_probability": 0.0,
}  # fmt: skip
PLAIN = ("fp32", "klein")
SIGMA = 0.7


@pytest.fixture
def load(comfyui: ComfyUI, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """load(form): the MODEL as UNETLoader gives it, in the executor's thread and inference mode."""
    from comfy.cli_args import args

    def loaded(form: str) -> Any:
        file, kind = FORMS[form]
        stock(f"diffusion_models/{file}")
        monkeypatch.setattr(args, "bf16_unet", form == "bf16")  # a CPU would be given fp32
        unet = torch.inference_mode()(comfyui.nodes.UNETLoader().load_unet)
        (model,) = comfyui.call(unet, f"{file}.safetensors", "default")
        assert form_of(model) == kind
        return model

    return loaded


def form_of(model: Any) -> Any:
    """The dtype of a block's weights, or the layout of quantised ones."""
    from comfy.quant_ops import QuantizedTensor

    network = model.model.diffusion_model
    linear = network.layers[0].attention.qkv if hasattr(network, "layers") else network.single_blocks[0].linear1
    weight = linear.weight
    return weight._layout_cls if isinstance(weight, QuantizedTensor) else weight.dtype


def dense(model: Any) -> Any:
    """The same weights as a MODEL that holds them in fp32."""
    import comfy.model_patcher
    from comfy.quant_ops import QuantizedTensor

    config = type(model.model.model_config)(dict(model.model.model_config.unet_config))
    config.set_inference_dtype(torch.float32, None)
    plain = config.get_model({}, "")
    with torch.inference_mode():
        values = {
            name: (value.dequantize() if isinstance(value, QuantizedTensor) else value).float()
            for name, value in model.model.diffusion_model.named_parameters()
            if not name.endswith("_scale")
        }
        plain.diffusion_model.load_state_dict(values)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(plain, load_device=cpu, offload_device=cpu)


def made_conditions(comfyui: ComfyUI, model: Any) -> Any:
    """Two pairs whose teacher knows more than the student."""
    conditioning, family = (
        comfyui.core("conditioning.encode"),
        comfyui.module("nodes.comfy_host.denoiser").family_of(model),
    )
    width = 64 if family.name == "z_image" else 192
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


def train(comfyui: ComfyUI, model: Any, name: str) -> Run:
    """A short D-OPSD Train LoRA on this MODEL."""
    workflow = shipped("z_image_turbo_train")
    inputs = {**workflow[node_of(workflow, "DOPSD_TrainLoRA")]["inputs"], **SETTINGS, "run_name": name}
    del inputs["vae"]
    given = give_values(comfyui, ("MODEL", "DOPSD_CONDITIONS"), [model, made_conditions(comfyui, model)])
    inputs |= {"model": ["given", 0], "conditions": ["given", 1]}
    run = comfyui.execute({"given": given, "train": {"class_type": "DOPSD_TrainLoRA", "inputs": inputs}})
    assert run.status == "success", run.error
    return run


def gradients(comfyui: ComfyUI, model: Any) -> list[Tensor]:
    """Of a LoRA whose every weight does something, called as a node is: inside inference mode."""

    def computed() -> list[Tensor]:
        conditions, denoiser = (
            made_conditions(comfyui, model),
            comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model),
        )
        pairs, generator = conditions.data.pairs, torch.Generator().manual_seed(4)
        x = torch.randn(2, *pairs[0].target_latent.shape, generator=generator)
        with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(x.shape):
            lora = denoiser.family.lora_config(4)
            adapters = comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), lora, teacher="frozen")
            values = {key: torch.randn(v.shape, generator=generator) * 0.05 for key, v in adapters.state().items()}
            adapters.load_state("student", values)
            with adapters.attached():
                out = denoiser.predict_x0(x, SIGMA, [pair.student for pair in pairs])
                out.square().mean().backward()
        return [parameter.grad for parameter in adapters.parameters()]

    return comfyui.call(computed)


def drawn(comfyui: ComfyUI, model: Any) -> Tensor:
    """A latent in two steps, by ComfyUI's sampler."""
    conditions = made_conditions(comfyui, model)
    family, features = conditions.family, conditions.data.pairs[0].student.features
    latent = torch.zeros(1, *family.latent_shape(64, 64))
    sample = torch.inference_mode()(comfyui.module("nodes.few_step_sampler").few_step_sample)
    return comfyui.call(sample, model, [[features[None], {}]], latent, 3, family.sigmas(2, 64, 64), "euler")


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of the state dict, bytes instead of 8-bit floats."""
    with torch.inference_mode():
        values = model.model.state_dict()
        return {k: (v.view(torch.uint8) if v.dtype.itemsize == 1 else v).clone() for k, v in values.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def relative(one: Any, other: Any) -> float:
    """The distance of two lists of tensors over the length of the second."""
    a, b = (torch.cat([value.flatten() for value in values]) for values in (one, other))
    return float((a - b).norm() / b.norm())


def learned(run: Run) -> list[Tensor]:
    """B, which was 0."""
    return [value for key, value in sorted(run.value("train").items()) if ".lora_B." in key]


# -- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if form not in PLAIN])
def test_a_training_on_it_is_one_on_the_same_weights_in_fp32(comfyui: ComfyUI, load: Any, form: str) -> None:
    """It learns the same and leaves the MODEL as it was, bit for bit.

    bf16 and, without fp8 units, fp8 are cast before they are used: nothing is rounded that the other does not round.
    int8 rounds activations in every forward: the gradients are off by some multiple of what the forwards are off by,
    and as Adam takes the first steps by signs, it goes the same way rather than to the same place.
    """
    model = load(form)
    before, held, parameters = drawn(comfyui, model), weights(model), list(model.model.parameters())
    run = train(comfyui, model, f"on-{form}")
    losses = run.value("train", 1)["loss"]
    assert losses[-1] < losses[0] < 1

    twin = dense(model)
    off, other = relative([before], [drawn(comfyui, twin)]), train(comfyui, twin, f"as-{form}")
    if not form.startswith("int8"):
        assert off == 0 and same(run.value("train"), other.value("train"))
    else:
        assert 1e-3 < off < 2e-2
        assert relative(gradients(comfyui, model), gradients(comfyui, twin)) < 5 * off
        direction = torch.cosine_similarity(
            *(torch.cat([b.flatten() for b in learned(r)]) for r in (run, other)), dim=0
        )
        assert direction > 0.98

    assert torch.equal(drawn(comfyui, model), before) and same(weights(model), held)
    assert all(now is then for now, then in zip(model.model.parameters(), parameters, strict=True))


def test_another_form_is_another_run(comfyui: ComfyUI, load: Any) -> None:
    """The two layouts of fp8 hold the same weights."""
    fingerprint = comfyui.module("nodes.comfy_host.denoiser").fingerprint
    digests = {form: fingerprint(load(form)) for form in FORMS}
    assert digests["fp8"] == digests.pop("fp8, older layout")
    assert len(set(digests.values())) == len(digests)


# -- left in RAM ------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_in_ram(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, ComfyUI loads models as on a card with room for half of their weights."""
    import comfy.model_management

    loaded_model = comfy.model_management.LoadedModel
    load_all = loaded_model.model_load

    def load_half(self: Any, _: float = 0, **options: Any) -> Any:
        return load_all(self, max(self.model_memory() / 2 - self.model_loaded_memory(), 0.1), **options)

    def begin() -> None:
        unload(comfyui)
        monkeypatch.setattr(loaded_model, "model_load", load_half)

    return begin


def unload(comfyui: ComfyUI) -> None:
    import comfy.model_management

    comfyui.call(torch.inference_mode()(comfy.model_management.unload_all_models))


def left_in_ram(model: Any) -> list[str]:
    """The modules whose weights are brought for each use."""
    return [name for name, module in model.model.named_modules() if hasattr(module, "prev_comfy_cast_weights")]


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp8", "int8", "klein"])
def test_gradients_with_half_of_the_weights_in_ram_are_the_same(
    comfyui: ComfyUI, load: Any, half_in_ram: Any, form: str
) -> None:
    model = load(form)
    held, wanted = weights(model), gradients(comfyui, model)
    assert not left_in_ram(model) and all(gradient.abs().max() > 0 for gradient in wanted)
    half_in_ram()
    got = gradients(comfyui, model)
    linears = [name for name in left_in_ram(model) if name.endswith((".w1", ".qkv", ".linear1"))]
    assert linears and model.model.model_lowvram
    assert 0.2 < model.loaded_size() / model.model_size() < 0.6
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    unload(comfyui)
    assert not left_in_ram(model) and same(weights(model), held)


def test_gradients_on_a_patched_model_half_in_ram(comfyui: ComfyUI, load: Any, half_in_ram: Any) -> None:
    """A LoRA on the base is put on in each use then, instead of once."""
    model = load("fp32")
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    loader = comfyui.nodes.NODE_CLASS_MAPPINGS["LoraModelLoader"]
    patched = comfyui.call(lambda: loader.execute(model, lora, 1.0).args[0])
    base, wanted = gradients(comfyui, model), gradients(comfyui, patched)
    assert relative(base, wanted) > 0.1
    half_in_ram()
    assert relative(gradients(comfyui, patched), wanted) < 1e-6
    assert any(module.weight_function for module in model.model.modules() if hasattr(module, "weight_function"))
    assert all(torch.equal(one, other) for one, other in zip(gradients(comfyui, model), base, strict=True))


def test_a_training_with_half_of_the_weights_in_ram(comfyui: ComfyUI, load: Any, half_in_ram: Any) -> None:
    model = load("fp32")
    before, wanted = drawn(comfyui, model), train(comfyui, model, "all-loaded")
    half_in_ram()
    run = train(comfyui, model, "half-in-ram")
    assert left_in_ram(model) and same(run.value("train"), wanted.value("train"))
    assert torch.equal(drawn(comfyui, model), before)
