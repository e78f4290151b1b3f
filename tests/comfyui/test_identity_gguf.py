"""Identity of bases that ComfyUI-GGUF's own loader nodes give: by their bytes, wherever these lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gguf_files
import pytest
import stock_files
import torch
from bases import drawn
from conftest import give_up
from inprocess import ComfyUI
from loaded import apply, identities, off_device, to_device
from loras import random_lora
from torch import nn

pytestmark = pytest.mark.long

FORMS = ("Q8_0", "Q4_0", "BF16")


@pytest.fixture(scope="module", autouse=True)
def pack(comfyui: ComfyUI) -> Iterator[None]:
    if reason := gguf_files.why_not():
        give_up(reason)
    gguf_files.load_pack(comfyui)
    folder = comfyui.base / "models" / "diffusion_models"
    with stock_files.thin():
        for form in FORMS:
            gguf_files.write(folder / f"identity-{form}.gguf", stock_files.z_image(), "lumina2", form)
        yield
    for form in FORMS:
        (folder / f"identity-{form}.gguf").unlink()


@pytest.fixture(scope="module")
def who(comfyui: ComfyUI) -> Callable[..., str]:
    return identities(comfyui)


@pytest.fixture(scope="module")
def load(comfyui: ComfyUI) -> Callable[..., Any]:
    """load(form): loaded anew. dequant_dtype: what its weights are brought to."""

    def loaded(form: str, dequant_dtype: str = "default") -> Any:
        settings = {"dequant_dtype": dequant_dtype, "patch_dtype": "default", "patch_on_device": False}
        return apply(comfyui, "UnetLoaderGGUFAdvanced", unet_name=f"identity-{form}.gguf", **settings)

    return loaded


def test_forms_and_what_they_are_brought_to_count(load: Any, who: Any) -> None:
    digests = [who(load(form)) for form in FORMS]
    digests += [who(load("Q8_0", dtype)) for dtype in ("float32", "float16")]
    assert len(set(digests)) == len(digests)
    assert who(load("Q8_0")) == digests[0]


def test_every_tensor_counts(load: Any, who: Any) -> None:
    model = load("Q4_0")
    before, count = who(model), 0
    for path, module in model.model.diffusion_model.named_modules():
        for name, tensor in [*module._parameters.items()]:
            if tensor is None:
                continue
            values = tensor.as_subclass(torch.Tensor).detach().clone()  # the file itself is mapped, and only to be read
            place = values.reshape(-1)[values.numel() // 2 :]
            place[0] = 1 if place[0] == 0 else 0
            other = values
            if hasattr(tensor, "tensor_type"):
                other = type(tensor)(values, tensor_type=tensor.tensor_type, tensor_shape=tensor.tensor_shape)
            module._parameters[name] = nn.Parameter(other, requires_grad=False)
            assert who(model) != before, f"{path}.{name}"
            module._parameters[name] = tensor
            count += 1
    assert count > 30 and who(model) == before


@pytest.mark.parametrize("form", FORMS)
def test_whatever_becomes_of_its_weights_a_model_stays_the_same(
    comfyui: ComfyUI, load: Any, who: Any, half_in_ram: Any, form: str
) -> None:
    model = load(form)
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    patched = apply(comfyui, "LoraModelLoader", model=model, lora=lora, strength_model=0.8)
    wanted = (who(model), who(patched))
    assert wanted[0] != wanted[1]

    def check(where: str) -> None:
        assert (who(model), who(patched)) == wanted, where

    for one in (model, patched):
        to_device(comfyui, one)
        check("loaded")
        drawn(comfyui, one)
        check("sampled")
    half_in_ram()
    for one in (model, patched):
        to_device(comfyui, one)
        check("half in RAM")
    off_device(comfyui)
    check("unloaded")
    assert who(load(form)) == wanted[0]
