"""The MODEL of a loader node as the core's Denoiser: right values, right gradients, and nothing left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from inprocess import ComfyUI

SHAPE = (3, 16, 8, 8)
SIGMA = 0.7


@pytest.fixture
def host(comfyui: ComfyUI) -> Any:
    return comfyui.module("nodes.comfy_host.denoiser")


def made_by_a_loader(**options: Any) -> Any:
    """A MODEL as the executor leaves it: its weights are inference tensors."""
    with torch.inference_mode():
        model = toy.z_image(**options)
    assert next(model.model.diffusion_model.parameters()).is_inference()
    return model


def inputs(comfyui: ComfyUI, lengths: tuple[int, ...] = (11, 20, 11)) -> tuple[torch.Tensor, list]:
    generator = torch.Generator().manual_seed(1)
    condition = comfyui.core("conditioning.encode").Condition
    x = torch.randn(SHAPE, generator=generator)
    return x, [condition(torch.randn(length, 64, generator=generator)) for length in lengths]


def new_adapters(comfyui: ComfyUI, host: Any, denoiser: Any) -> Any:
    config = comfyui.core("families").Z_IMAGE.lora_config(4, 8.0)
    return comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, seed=0, teacher="frozen")


def randomise_b(adapters: Any) -> None:
    state = adapters.state()
    generator = torch.Generator().manual_seed(2)
    for key, value in state.items():
        if ".lora_B." in key:
            value.normal_(0, 0.02, generator=generator)
    adapters.load_state("student", state)


def output(denoiser: Any, x: torch.Tensor, conditions: list) -> torch.Tensor:
    with torch.inference_mode(), denoiser.loaded(SHAPE):
        return denoiser.predict_x0(x, SIGMA, conditions)


def lora_gradients(comfyui: ComfyUI, host: Any, model: Any, x: torch.Tensor, conditions: list) -> dict:
    """Through our bridge, called as a node is: inside inference mode."""
    denoiser = host.ComfyDenoiser(model)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(SHAPE):
        adapters = new_adapters(comfyui, host, denoiser)
        randomise_b(adapters)
        with adapters.attached():
            denoiser.predict_x0(x, SIGMA, conditions).square().mean().backward()
    return dict(zip(adapters.state(), _split_gradients(adapters), strict=True))


def _split_gradients(adapters: Any) -> list[torch.Tensor]:
    out = []
    for adapter in adapters._adapters:
        rank = adapters.config.rank
        for number, b in enumerate(adapter.student.b):
            out += [adapter.student.a.grad[number * rank : (number + 1) * rank], b.grad]
    return out


def plain_gradients(comfyui: ComfyUI, host: Any, x: torch.Tensor, conditions: list) -> dict:
    """Ordinary autograd over an ordinary copy of the weights, LoRA as hooks: no line of ours but the names."""
    import comfy.model_management

    model = toy.z_image()
    denoiser = host.ComfyDenoiser(model)
    adapters = new_adapters(comfyui, host, denoiser)
    randomise_b(adapters)
    weights = {key: value.requires_grad_() for key, value in adapters.state().items()}
    handles = []
    for site in denoiser.sites():
        parts = [part for part in site.parts if f"{part.name}.lora_A.weight" in weights]

        def hook(_: Any, args: tuple, out: torch.Tensor, parts: list = parts) -> torch.Tensor:
            pieces = [
                (args[0] @ weights[f"{part.name}.lora_A.weight"].T) @ weights[f"{part.name}.lora_B.weight"].T
                for part in parts
            ]
            return out + 2.0 * torch.cat(pieces, -1)

        if parts:
            handles.append(site.module.register_forward_hook(hook))
    comfy.model_management.in_training = True
    try:
        per_sample = [
            model.model.apply_model(
                x[i : i + 1], torch.tensor([SIGMA]), c_crossattn=c.features[None], num_tokens=len(c.features)
            )
            for i, c in enumerate(conditions)
        ]
        torch.cat(per_sample).square().mean().backward()
    finally:
        comfy.model_management.in_training = False
    return {key: value.grad for key, value in weights.items()}


def relative_error(got: dict, wanted: dict) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted)


def test_gradients_are_those_of_plain_autograd(comfyui: ComfyUI, host: Any) -> None:
    x, conditions = inputs(comfyui)
    wanted = plain_gradients(comfyui, host, x, conditions)
    assert len(wanted) == 2 * 7 * 4 and all(value.norm() > 0 for value in wanted.values())
    assert relative_error(lora_gradients(comfyui, host, made_by_a_loader(), x, conditions), wanted) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "compute"), [(torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.float32)], ids=["bf16", "fp8"]
)
def test_gradients_through_cast_weights(comfyui: ComfyUI, host: Any, dtype: torch.dtype, compute: torch.dtype) -> None:
    """Weights that ComfyUI casts in each forward give the gradients of the same values held in fp32."""
    x, conditions = inputs(comfyui)
    cast = made_by_a_loader(dtype=dtype, compute=compute)
    plain = made_by_a_loader()
    with torch.inference_mode():
        values = cast.model.diffusion_model.state_dict()
        plain.model.diffusion_model.load_state_dict({key: value.float() for key, value in values.items()})
    got = lora_gradients(comfyui, host, cast, x, conditions)
    assert relative_error(got, lora_gradients(comfyui, host, plain, x, conditions)) < 1e-4


def test_untrained_lora_is_the_base_to_the_bit(comfyui: ComfyUI, host: Any) -> None:
    x, conditions = inputs(comfyui)
    denoiser = host.ComfyDenoiser(made_by_a_loader())
    with torch.inference_mode(False), denoiser.trainable(SHAPE):
        with torch.no_grad():
            base = denoiser.predict_x0(x, SIGMA, conditions)
        with new_adapters(comfyui, host, denoiser).attached():
            assert torch.equal(denoiser.predict_x0(x, SIGMA, conditions), base)


def test_lengths_together_are_lengths_alone(comfyui: ComfyUI, host: Any) -> None:
    x, conditions = inputs(comfyui, (9, 33, 64))
    denoiser = host.ComfyDenoiser(made_by_a_loader())
    alone = torch.cat([output(denoiser, x[i : i + 1], conditions[i : i + 1]) for i in range(3)])
    assert torch.allclose(output(denoiser, x, conditions), alone, atol=1e-5)


@pytest.mark.parametrize("ending", ["success", "error", "interrupt"])
def test_the_model_is_left_as_it_was(comfyui: ComfyUI, host: Any, ending: str) -> None:
    import comfy.model_management

    model = made_by_a_loader()
    network = model.model.diffusion_model
    x, conditions = inputs(comfyui)
    denoiser = host.ComfyDenoiser(model)
    before, parameters = output(denoiser, x, conditions), dict(network.named_parameters())
    ends = {"success": None, "error": ValueError("stop")}
    wanted = {"error": ValueError, "interrupt": comfy.model_management.InterruptProcessingException}

    def train_a_little() -> None:
        with torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(SHAPE):
            adapters = new_adapters(comfyui, host, denoiser)
            randomise_b(adapters)
            with adapters.attached():
                changed = denoiser.predict_x0(x, SIGMA, conditions)
                changed.mean().backward()
                assert not torch.equal(changed, before)
                if ending == "interrupt":
                    comfy.model_management.interrupt_current_processing()
                    denoiser.predict_x0(x, SIGMA, conditions)
                elif ends[ending]:
                    raise ends[ending]

    if ending == "success":
        train_a_little()
    else:
        with pytest.raises(wanted[ending]):
            train_a_little()
    assert not comfy.model_management.processing_interrupted()
    assert not comfy.model_management.in_training
    assert all("forward" not in module.__dict__ for module in network.modules())
    after = dict(network.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is value for name, value in parameters.items())
    assert torch.equal(output(denoiser, x, conditions), before)


def test_other_models_are_refused_by_name(comfyui: ComfyUI) -> None:
    class SD15:
        pass

    model = SimpleNamespace(model=SimpleNamespace(model_config=SD15()))
    with pytest.raises(ValueError, match="a SD15; D-OPSD trains Z-Image-Turbo, FLUX.2-klein and Krea 2 Turbo"):
        comfyui.module("nodes.comfy_host.families").family_of(model)
