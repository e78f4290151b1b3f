"""Weights that are not where they are needed: the gradients are those of a MODEL that is loaded whole, to the bit.

ComfyUI's classic loading leaves any share of the weights in RAM, norms among them, and brings each for its use into a
buffer that the next one overwrites; its dynamic VRAM lets pages go at any time. On a CPU nothing is moved, so a wrong
value shows on a device only; there every line of this runs too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bases
import pytest
import torch
import toy
from bases import drawn, left_in_ram, same, unload
from gradient import SELECTIVE, difference, equal, features, gradients, held
from inprocess import ComfyUI
from torch import Tensor

pytestmark = pytest.mark.long

Stock = Callable[..., None]
FAST = {"fp8 fast": "z_image_turbo_bf16", "klein fp8 fast": "flux-2-klein-4b"}
"""Files that UNETLoader is asked to hold in fp8 and multiply in it, which a CPU does not do."""
FORMS = [*(form for form in bases.FORMS if form not in ("fp32", "fp8, older layout")), *FAST]


@pytest.fixture
def load(comfyui: ComfyUI, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """load(form): the MODEL as UNETLoader gives it; a CPU computes in fp32 but for the form bf16."""
    from comfy.cli_args import args

    def loaded(form: str) -> Any:
        file = FAST[form] if form in FAST else bases.FORMS[form].file
        stock(f"diffusion_models/{file}")
        monkeypatch.setattr(args, "bf16_unet", form == "bf16")
        unet = torch.inference_mode()(comfyui.nodes.UNETLoader().load_unet)
        (model,) = comfyui.call(unet, f"{file}.safetensors", "fp8_e4m3fn_fast" if form in FAST else "default")
        return model

    return loaded


@pytest.fixture
def leave_in_ram(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """leave_in_ram(share): from then on ComfyUI's classic loading leaves about that share of the weights in RAM."""
    import comfy.model_management

    loaded_model = comfy.model_management.LoadedModel
    load_all = loaded_model.model_load

    def begin(share: float) -> None:
        def load_some(self: Any, _: float = 0, **options: Any) -> Any:
            room = self.model_memory() * (1 - share) - self.model_loaded_memory()
            return load_all(self, max(room, 0.1), **options)

        unload(comfyui)
        monkeypatch.setattr(loaded_model, "model_load", load_some)

    return begin


def teachers_look(comfyui: ComfyUI, model: Any) -> Callable[[Any, Tensor], None]:
    """What a rollout step does between the student's forward and its backward: every weight is used once more."""
    (condition,) = features(comfyui, model, 24)
    return lambda denoiser, x: denoiser.predict_x0(x, 0.4, [condition.to(denoiser.device)] * len(x))


@pytest.mark.parametrize("share", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_a_model_that_is_loaded_whole(
    comfyui: ComfyUI, load: Any, leave_in_ram: Any, form: str, share: float
) -> None:
    model = load(form)
    drawn(comfyui, model)  # ComfyUI's first loading rewrites some weights in the dtype that they compute in
    before, looks = held(model.model), teachers_look(comfyui, model)
    wanted = gradients(comfyui, model)
    assert equal(gradients(comfyui, model, looks), wanted)
    leave_in_ram(share)
    drawn(comfyui, model)  # by ComfyUI's sampler, in inference mode: its buffers are made there
    for recompute in (0, 99, SELECTIVE):
        assert equal(gradients(comfyui, model, looks, recompute), wanted)
    if not model.is_dynamic():
        names = left_in_ram(model)
        # Krea 2's norms are not ComfyUI's: they are loaded always
        assert names and (share < 1 or "krea 2" in form or any("norm" in name for name in names))
    unload(comfyui)
    assert same(held(model.model), before)


def wide_reader() -> Any:
    """A Z-Image whose text features are so wide that dynamic VRAM does not keep the norm of them on the device."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.ZImage({**toy.z_image().model.model_config.unet_config, "cap_feat_dim": 12000})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = None
    model = toy.network(config)
    toy.fill(model.diffusion_model)
    comfy.model_management.archive_model_dtypes(model.diffusion_model)
    return comfy.model_patcher.CoreModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_patched_norm_is_patched_in_the_backward_too(comfyui: ComfyUI, leave_in_ram: Any, share: float) -> None:
    """The patch is put on in each use, in the buffer, where the weight itself stays in RAM."""
    key = "diffusion_model.cap_embedder.0.weight"
    with torch.inference_mode():
        base, baked = wide_reader(), wide_reader()
        change = torch.linspace(0, 3, 12000)
        baked.model.diffusion_model.cap_embedder[0].weight += change
    patched = base.clone()
    assert patched.add_patches({key: ("diff", (change,))}, 1.0) == [key]
    leave_in_ram(share)
    wanted, got = gradients(comfyui, baked), gradients(comfyui, patched)
    # ComfyUI computes patches in fp16 on some devices
    assert difference(got, wanted) < 1e-3 < 0.05 < difference(gradients(comfyui, base), wanted)
