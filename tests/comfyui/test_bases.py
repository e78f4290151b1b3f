"""Base weights in every form that users have them in: whole trainings on 8-bit files, and with weights left in RAM.

Weights in RAM are those of ComfyUI's classic partial loading, with all its casts, patches and bookkeeping. On a CPU
they lie where the others do; on_cuda/ has what needs a device, its dynamic VRAM too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import (
    FORMS,
    Load,
    drawn,
    equal,
    gradients,
    is_dynamic,
    learned,
    left_in_ram,
    relative,
    same,
    train,
    unload,
    variants,
    weights,
)
from gradient import SELECTIVE
from inprocess import ON_CPU, ComfyUI
from loras import random_lora

HalfInRam = Callable[[], None]

NARROW = [form for form in FORMS if form not in ("fp32", "klein", "krea 2")]


@pytest.fixture
def classic(comfyui: ComfyUI) -> None:
    """ComfyUI's classic partial loading."""
    if is_dynamic():
        pytest.skip("dynamic VRAM does not load in parts; on_cuda/ has its own")


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


# -- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", variants(NARROW))
def test_a_training_on_it_is_one_on_the_same_weights_in_fp32(comfyui: ComfyUI, load: Load, form: str) -> None:
    """It learns the same and leaves the MODEL as it was, bit for bit.

    On a CPU 16 bits and fp8 are cast before they are used: nothing is rounded that the other does not round. int8
    rounds activations in every forward, and a GPU computes in 16 bits or, on fp8, in 8: the gradients are off by some
    multiple of what the forwards are off by, and as Adam takes the first steps by signs, it goes the same way rather
    than to the same place.
    """
    model = load(form)
    before, held, parameters = drawn(comfyui, model), weights(model), list(model.model.parameters())
    run = train(comfyui, model, f"on-{form}")
    losses = run.value("train", 1)["loss"]
    assert losses[-1] < losses[0] * (1 if ON_CPU else 1.1) and losses[0] < 1

    twin = dense(model)
    off, other = relative([before], [drawn(comfyui, twin)]), train(comfyui, twin, f"as-{form}")
    if ON_CPU and "int8" not in form:
        if "krea 2" in form:  # a Linear with one row, whose products are summed in either order
            assert off < 1e-6 and relative(learned(run), learned(other)) < 1e-2
        else:
            assert off == 0 and same(run.value("train"), other.value("train"))
    else:
        assert 1e-4 < off < 5e-2
        assert relative(gradients(comfyui, model), gradients(comfyui, twin)) < 5 * off
        direction = torch.cosine_similarity(
            *(torch.cat([b.flatten() for b in learned(r)]) for r in (run, other)), dim=0
        )
        assert direction > (0.97 if ON_CPU else 0.8)

    assert torch.equal(drawn(comfyui, model), before) and same(weights(model), held)
    if ON_CPU:  # a move makes new ones
        assert all(now is then for now, then in zip(model.model.parameters(), parameters, strict=True))


def test_another_form_is_another_run(comfyui: ComfyUI, load: Load) -> None:
    """The two layouts of fp8 hold the same weights."""
    fingerprint = comfyui.module("nodes.comfy_host.identity").fingerprint
    digests = {form: fingerprint(load(form)) for form in FORMS}
    older = digests.pop("fp8, older layout")
    if ON_CPU:  # fp8 units multiply the newer one in 8 bits, and the older one not
        assert digests["fp8"] == older
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize("form", variants(NARROW))
def test_selective_checkpointing_on_it_changes_no_bit(comfyui: ComfyUI, load: Load, form: str) -> None:
    model = load(form)
    assert equal(gradients(comfyui, model, SELECTIVE), gradients(comfyui, model))


# -- left in RAM ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("classic")
@pytest.mark.parametrize("form", variants(["fp32", "bf16", "fp8", "int8", "klein", "krea 2"]))
def test_gradients_with_half_of_the_weights_in_ram_are_the_same(
    comfyui: ComfyUI, load: Load, half_in_ram: HalfInRam, form: str
) -> None:
    model = load(form)
    held, wanted = weights(model), gradients(comfyui, model)
    assert not left_in_ram(model) and all(gradient.abs().max() > 0 for gradient in wanted)
    half_in_ram()
    got = gradients(comfyui, model)
    linears = [name for name in left_in_ram(model) if name.endswith((".w1", ".qkv", ".linear1", ".wq"))]
    assert linears and model.model.model_lowvram
    assert 0.2 < model.loaded_size() / model.model_size() < 0.6
    assert equal(got, wanted)
    unload(comfyui)
    assert not left_in_ram(model) and same(weights(model), held)


@pytest.mark.usefixtures("classic")
def test_gradients_on_a_patched_model_half_in_ram(comfyui: ComfyUI, load: Load, half_in_ram: HalfInRam) -> None:
    """A LoRA on the base is put on in each use then, instead of once."""
    model = load("fp32")
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    loader = comfyui.nodes.NODE_CLASS_MAPPINGS["LoraModelLoader"]
    patched = comfyui.call(lambda: loader.execute(model, lora, 1.0).args[0])
    base, wanted = gradients(comfyui, model), gradients(comfyui, patched)
    assert relative(base, wanted) > 0.1
    half_in_ram()
    assert relative(gradients(comfyui, patched), wanted) < (1e-6 if ON_CPU else 3e-3)  # multiplied out in 16 bits there
    assert any(module.weight_function for module in model.model.modules() if hasattr(module, "weight_function"))
    assert equal(gradients(comfyui, model), base)


@pytest.mark.usefixtures("classic")
def test_a_training_with_half_of_the_weights_in_ram(comfyui: ComfyUI, load: Load, half_in_ram: HalfInRam) -> None:
    model = load("fp32")
    before, wanted = drawn(comfyui, model), train(comfyui, model, "all-loaded")
    half_in_ram()
    run = train(comfyui, model, "half-in-ram")
    assert left_in_ram(model) and same(run.value("train"), wanted.value("train"))
    assert torch.equal(drawn(comfyui, model), before)
