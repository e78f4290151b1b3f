"""What counts of a MODEL by content, and where its weights lie does not: loaders' weights, patches, stock nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from bases import drawn
from inprocess import ComfyUI
from loaded import FILES, apply, identities, load, off_device, to_device
from loras import random_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

QUANTISED = {
    "fp8": "z_image_turbo_fp8_scaled",
    "int8": "z_image_turbo_int8",
    "int8 convrot": "z_image_turbo_int8_convrot",
    "klein fp8": "flux-2-klein-4b-fp8",
}
KINDS = [
    pytest.param(kind, marks=[pytest.mark.long] * (kind not in ("MODEL", "klein", "fp8")))
    for kind in ("MODEL", "klein", *QUANTISED)
]


@pytest.fixture(scope="module")
def who(comfyui: ComfyUI) -> Callable[..., str]:
    return identities(comfyui)


@pytest.fixture(scope="module")
def fresh(comfyui: ComfyUI, stock: Callable[..., None]) -> Callable[[str], Any]:
    """fresh(kind): loaded anew, also quantised."""
    stock(*FILES, *(f"diffusion_models/{name}" for name in QUANTISED.values()))

    def loaded(kind: str) -> Any:
        if kind in QUANTISED:
            return load(comfyui, "MODEL", unet_name=f"{QUANTISED[kind]}.safetensors")
        return load(comfyui, kind)

    return loaded


@pytest.fixture(scope="module")
def model(fresh: Callable[[str], Any]) -> Any:
    """Shared; to be left as it is."""
    return fresh("MODEL")


def dynamic(model: Any) -> bool:
    """Whether ComfyUI's dynamic VRAM has it; tests run under it where there is a GPU."""
    return getattr(model, "patcher", model).is_dynamic()


# -- weights ----------------------------------------------------------------------------------------------------------


def tensors_of(network: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[Tensor], None]]]:
    """(name, get, put) of every tensor that is loaded, the inner ones of quantised weights too."""
    from comfy.quant_ops import QuantizedTensor

    for path, module in network.named_modules():
        for places in (module._parameters, module._buffers):
            own: dict[str, Any] = dict(places)
            for name, value in own.items():
                if value is None or name in module._non_persistent_buffers_set:
                    continue
                if isinstance(value, QuantizedTensor):
                    yield f"{path}.{name}", lambda v=value: v._qdata, lambda t, v=value: setattr(v, "_qdata", t)
                    for field in ("scale", "block_scale"):
                        if isinstance(getattr(value._params, field, None), Tensor):
                            holder = value._params
                            put = lambda t, h=holder, f=field: object.__setattr__(h, f, t)  # noqa: E731
                            yield f"{path}.{name}.{field}", lambda h=holder, f=field: getattr(h, f), put
                else:
                    wrap = nn.Parameter if places is module._parameters else (lambda t, **_: t)
                    put = lambda t, p=places, n=name, w=wrap: p.update({n: w(t, requires_grad=False)})  # noqa: E731
                    yield f"{path}.{name}", lambda v=value: v.data, put


def changed(tensor: Tensor) -> Tensor:
    """Another bit in one value; in the values of a row where a tensor is too large to be read whole."""
    with torch.inference_mode():
        other = tensor.clone().contiguous()
        bits = other.reshape(-1).view(torch.uint8)
        count = 1 if bits.numel() <= 2**20 else bits.numel() // tensor.shape[0]
        end = other.element_size() - 1  # the byte of sign and exponent
        bits[end : count * other.element_size() : other.element_size()] ^= 1
    return other


@pytest.mark.parametrize("kind", [*KINDS, "CLIP", "VAE", "vision"])
def test_every_tensor_counts(fresh: Any, who: Any, kind: str) -> None:
    """A single one changed alone, in its last value that is read whole, makes another."""
    value = fresh(kind)
    before, count = who(value), 0
    tensors = list(tensors_of(getattr(value, "patcher", value).model))
    step = max(1, len(tensors) // 60)
    for name, get, put in tensors[::step]:
        if name.startswith("model_sampling."):
            continue
        original = get()
        put(changed(original))
        assert who(value) != before, name
        put(original)
        count += 1
    assert count >= 20 and who(value) == before


def test_a_class_of_layers_and_a_function_over_one_count(fresh: Any, who: Any) -> None:
    model = fresh("MODEL")
    before = who(model)
    layer = model.model.diffusion_model.layers[0].attention
    own = layer.forward
    layer.forward = own  # as ComfyUI's unpatching leaves it
    assert who(model) == before
    layer.forward = lambda *args, **options: own(*args, **options)
    assert who(model) != before
    del layer.forward
    handle = layer.register_forward_hook(lambda *_: None)
    assert who(model) != before
    handle.remove()
    assert who(model) == before
    layer.__class__ = type("Attention", (type(layer),), {})
    assert who(model) != before


def test_a_merged_file_is_another_model(comfyui: ComfyUI, fresh: Any, who: Any) -> None:
    """Norms untouched, one matrix of many; and a copy of the file under another name is none."""
    folder = comfyui.base / "models" / "diffusion_models"
    weights = load_file(folder / "z_image_turbo_bf16.safetensors")
    before = who(fresh("MODEL"))
    names = {"copy": None, "merge": "layers.1.attention.qkv.weight", "noise": "x_embedder.weight"}
    digests = {}
    try:
        for name, key in names.items():
            own = dict(weights)
            if key:
                up, down = torch.randn(own[key].shape[0], 1), torch.randn(1, own[key].shape[1])
                own[key] = (own[key].float() + 0.02 * up @ down).to(own[key].dtype)
            save_file(own, folder / f"test_{name}.safetensors")
            digests[name] = who(load(comfyui, "MODEL", unet_name=f"test_{name}.safetensors"))
    finally:
        for name in names:
            (folder / f"test_{name}.safetensors").unlink(missing_ok=True)
    assert digests["copy"] == before and len(set(digests.values())) == 3


def test_a_file_that_was_exchanged_under_its_name_is_another_model(comfyui: ComfyUI, fresh: Any, who: Any) -> None:
    """Of the same size and of the same time: it goes by the weights."""
    fresh("MODEL")
    folder = comfyui.base / "models" / "diffusion_models"
    path = folder / "test_exchanged.safetensors"
    weights = load_file(folder / "z_image_turbo_bf16.safetensors")
    try:
        digests = []
        for factor in (1.0, 1.5):
            weights["layers.0.feed_forward.w1.weight"] *= factor
            save_file(weights, path)
            os.utime(path, (1, 1))
            digests.append(who(load(comfyui, "MODEL", unet_name=path.name)))
    finally:
        path.unlink(missing_ok=True)
    assert digests[0] != digests[1] and digests[0] == who(fresh("MODEL"))


def test_a_loaders_choice_of_dtype_counts(comfyui: ComfyUI, fresh: Any, who: Any) -> None:
    kinds = ("default", "fp8_e4m3fn", "fp8_e5m2")
    digests = {kind: who(load(comfyui, "MODEL", weight_dtype=kind)) for kind in kinds}
    assert len(set(digests.values())) == len(kinds)


def test_a_wider_file_is_what_it_is_computed_as(who: Any) -> None:
    """At its first load ComfyUI may rewrite what a Z-Image's network holds itself, from a file's fp32 to its bf16."""
    model = toy.z_image(torch.bfloat16)
    network = model.model.diffusion_model
    for name in ("x_pad_token", "cap_pad_token"):
        setattr(network, name, nn.Parameter(torch.randn(1, 256), requires_grad=False))
    before = who(model)
    for name in ("x_pad_token", "cap_pad_token"):
        parameter = getattr(network, name)
        parameter.data = parameter.data.to(getattr(network, f"{name}_comfy_model_dtype"))
    assert network.x_pad_token.dtype == torch.bfloat16 and who(model) == before
    network.x_pad_token.data += 1
    assert who(model) != before


def test_a_file_in_fp32_is_the_same_model_before_and_after_its_first_load(
    comfyui: ComfyUI, fresh: Any, who: Any
) -> None:
    """Where ComfyUI keeps the file mapped and computes in bf16, its first load rewrites the padding tokens."""
    fresh("MODEL")
    folder = comfyui.base / "models" / "diffusion_models"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value.float() + 1e-4 * torch.randn(value.shape, generator=generator)
        for name, value in load_file(folder / "z_image_turbo_bf16.safetensors").items()
    }
    save_file(weights, folder / "test_wide.safetensors")
    try:
        model = load(comfyui, "MODEL", unet_name="test_wide.safetensors")
        before = who(model)
        to_device(comfyui, model)
        assert who(model) == before
        drawn(comfyui, model)
        off_device(comfyui)
        assert who(model) == before == who(load(comfyui, "MODEL", unet_name="test_wide.safetensors"))
    finally:
        (folder / "test_wide.safetensors").unlink()


# -- where they lie ---------------------------------------------------------------------------------------------------


def with_lora(comfyui: ComfyUI, model: Any, seed: int = 0) -> Any:
    """A LoRA with `.diff` on norms and biases, as ComfyUI's own Train LoRA writes them."""
    lora = random_lora(comfyui, model, 0.5, 4, seed)
    for name, value in model.model.diffusion_model.state_dict().items():
        if value.ndim == 1 and name.endswith((".weight", ".bias")):
            kind = "diff" if name.endswith(".weight") else "diff_b"
            lora[f"diffusion_model.{name.rpartition('.')[0]}.{kind}"] = torch.full(value.shape, 0.01)
    return apply(comfyui, "LoraModelLoader", model=model, lora=lora, strength_model=0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_becomes_of_its_weights_a_model_stays_the_same(
    comfyui: ComfyUI,
    fresh: Any,
    who: Any,
    half_in_ram: Any,
    kind: str,
) -> None:
    """Loaded, sampled, another clone's patches in them, half in RAM, unloaded, loaded anew."""
    model = fresh(kind)
    before = who(model)
    patched, other = with_lora(comfyui, model), with_lora(comfyui, model, seed=1)
    wanted = {"plain": before, "patched": who(patched), "other": who(other)}
    assert len(set(wanted.values())) == 3

    def check(where: str) -> None:
        found = {"plain": who(model), "patched": who(patched), "other": who(other)}
        assert found == wanted, where
        assert who(patched.clone()) == wanted["patched"], where

    to_device(comfyui, model)
    check("loaded")
    drawn(comfyui, model)
    check("sampled")
    drawn(comfyui, patched)
    check("a clone's patches are in the weights")
    to_device(comfyui, other)
    check("another clone's")
    if not dynamic(model):
        half_in_ram()
        for one in (model, patched):
            to_device(comfyui, one)
            assert model.model.model_lowvram
            check("half in RAM")
            drawn(comfyui, one)
            check("half in RAM, and sampled")
    off_device(comfyui)
    check("unloaded")
    assert who(fresh(kind)) == before
    assert who(with_lora(comfyui, fresh(kind))) == wanted["patched"]


@pytest.mark.parametrize("kind", ["CLIP", "VAE", "vision"])
def test_whatever_becomes_of_its_weights_an_encoder_stays_the_same(
    comfyui: ComfyUI, fresh: Any, who: Any, kind: str
) -> None:
    value = fresh(kind)
    before = who(value)
    to_device(comfyui, value)
    assert who(value) == before
    if kind == "CLIP":
        other = value.clone()
        name = next(name for name in value.patcher.model.state_dict() if name.endswith("q_proj.weight"))
        shape = value.patcher.model.state_dict()[name].shape
        assert other.add_patches({name: ("diff", (torch.ones(shape),))})
        patched = who(other)
        assert patched != before
        comfyui.call(torch.inference_mode()(lambda: other.encode_from_tokens(other.tokenize("a cat"))))
        assert (who(value), who(other)) == (before, patched)
        last = value.clone()
        last.clip_layer(-3)
        comfyui.call(torch.inference_mode()(lambda: last.encode_from_tokens(last.tokenize("a cat"))))
        assert who(value) == before != who(last)
    if kind == "VAE":
        comfyui.call(torch.inference_mode()(value.encode), torch.rand(1, 64, 64, 3))
        assert who(value) == before
    off_device(comfyui)
    assert who(value) == before == who(fresh(kind))


def test_hooks_that_are_on_change_nothing(comfyui: ComfyUI, fresh: Any, who: Any) -> None:
    """LoRAs that conditions switch on write over the weights while they are on."""
    model = fresh("MODEL")
    if dynamic(model):
        pytest.skip("dynamic VRAM has no hooks")
    before = who(model)
    name = "diffusion_model.x_embedder.weight"
    value = model.model.diffusion_model.x_embedder.weight
    model.hook_backup[name] = (value.data, value.device)
    model.model.diffusion_model.x_embedder.weight = nn.Parameter(value.data + 1, requires_grad=False)
    assert who(model) == before
    model.hook_backup.clear()
    assert who(model) != before


# -- patches ----------------------------------------------------------------------------------------------------------


WEIGHT = "diffusion_model.layers.0.attention.out.weight"  # [256, 256]


def adapters() -> dict[str, tuple[str, list[Any]]]:
    """Class and parts of every kind of adapter that ComfyUI loads, for `WEIGHT`."""
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "LoRA": ("LoRAAdapter", [r(256, 4), r(4, 256), 2.0, None, r(256, 1), None]),
        "LoHa": ("LoHaAdapter", [r(256, 4), r(4, 256), 2.0, r(256, 4), r(4, 256), None, None, r(256, 1)]),
        "LoKr": ("LoKrAdapter", [r(16, 16), r(16, 16), 2.0, None, None, None, None, None, r(256, 1)]),
        "OFT": ("OFTAdapter", [r(4, 64, 64), None, 2.0, None]),
    }


def patched(model: Any, value: Any, key: Any = WEIGHT, strength: float = 0.5, of_model: float = 1.0) -> Any:
    other = model.clone()
    assert other.add_patches({key: value}, strength, of_model)
    return other


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "OFT"])
def test_every_part_of_an_adapter_counts(model: Any, who: Any, kind: str) -> None:
    import comfy.weight_adapter as adapters_of_comfy

    name, parts = adapters()[kind]
    make = getattr(adapters_of_comfy, name)
    digests = [who(model), who(patched(model, make({"a key"}, parts)))]
    assert who(patched(model, make({"another name in the file"}, parts))) == digests[1]
    for index, part in enumerate(parts):
        if part is not None:
            others = [*parts]
            others[index] = part + 1
            digests.append(who(patched(model, make(set(), others))))
    assert len(set(digests)) == len(digests)


def test_strengths_slices_kinds_and_order_of_patches_count(model: Any, who: Any) -> None:
    import comfy.model_base

    ones, twos = torch.ones(256, 256), torch.full((256, 256), 2.0)
    plain = ("diff", (ones,))
    some = [
        model,
        patched(model, plain),
        patched(model, plain, strength=0.6),
        patched(model, plain, of_model=0.9),
        patched(model, ("diff", (twos,))),
        patched(model, ("diff", (ones.bfloat16(),))),
        patched(model, ("diff", (ones, {"pad_weight": True}))),
        patched(model, ("set", (ones,))),
        patched(model, ("model_as_lora", (ones,))),
        patched(model, ("diff", (torch.ones(128, 256),)), key=(WEIGHT, (0, 0, 128))),
        patched(model, ("diff", (torch.ones(128, 256),)), key=(WEIGHT, (0, 128, 128))),
        patched(model, plain, key=(WEIGHT, None, comfy.model_base.torch.neg)),
        patched(model, plain, key=WEIGHT.replace("layers.0", "layers.1")),
        patched(patched(model, plain), ("set", (twos,))),
        patched(patched(model, ("set", (twos,))), plain),
        patched(patched(model, plain), plain),
    ]
    assert len({who(value) for value in some}) == len(some)
    one = patched(patched(model, plain), plain, key=WEIGHT.replace("layers.0", "layers.1"))
    other = patched(patched(model, plain, key=WEIGHT.replace("layers.0", "layers.1")), plain)
    assert who(one) == who(other), "patches of different weights have no order"


def test_merges_count_by_the_other_models_weights(comfyui: ComfyUI, fresh: Any, who: Any) -> None:
    """And neither of the two has to be loaded or unloaded for it."""
    one, two, three = fresh("MODEL"), fresh("MODEL"), fresh("MODEL")
    with torch.inference_mode():
        weight = three.model.diffusion_model.layers[0].feed_forward.w1
        weight.weight = nn.Parameter(weight.weight * 2, requires_grad=False)

    def merge(other: Any, ratio: float) -> Any:
        return apply(comfyui, "ModelMergeSimple", model1=one, model2=other, ratio=ratio)

    with_two, with_three, weaker = merge(two, 0.5), merge(three, 0.5), merge(three, 0.7)
    digests = [who(value) for value in (one, with_two, with_three, weaker)]
    assert len(set(digests)) == 4
    to_device(comfyui, two)
    to_device(comfyui, three)
    assert [who(value) for value in (one, with_two, with_three, weaker)] == digests
    drawn(comfyui, with_three)
    assert [who(value) for value in (one, with_two, with_three, weaker)] == digests
    to_device(comfyui, with_lora(comfyui, three))
    off_device(comfyui)
    assert [who(value) for value in (one, merge(two, 0.5), merge(three, 0.5))] == digests[:3]


# -- stock nodes ------------------------------------------------------------------------------------------------------


ROPE = {"scale_y": 1.0, "shift_x": 0.0, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0}
EASY = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}
NODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # two settings that act differently
    "ScaleROPE": ({"scale_x": 1.5, **ROPE}, {"scale_x": 1.4, **ROPE}),
    "ModelSamplingAuraFlow": ({"shift": 2.0}, {"shift": 2.5}),
    "ModelComputeDtype": ({"dtype": "bf16"}, {"dtype": "fp16"}),
    "EasyCache": ({"reuse_threshold": 0.2, **EASY}, {"reuse_threshold": 0.3, **EASY}),
    "LazyCache": ({"reuse_threshold": 0.2, **EASY}, {"reuse_threshold": 0.3, **EASY}),
    "TorchCompileModel": ({"backend": "inductor"}, {"backend": "cudagraphs"}),
    "TomePatchModel": ({"ratio": 0.3}, {"ratio": 0.4}),
    "RescaleCFG": ({"multiplier": 0.7}, {"multiplier": 0.8}),
    "RenormCFG": ({"cfg_trunc": 1.0, "renorm_cfg": 1.0}, {"cfg_trunc": 2.0, "renorm_cfg": 1.0}),
    "APG": (
        {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0},
        {"eta": 1.0, "norm_threshold": 6.0, "momentum": 0.0},
    ),
    "LoraModelLoader": ({"strength_model": 0.5, "bypass": False}, {"strength_model": 0.6, "bypass": False}),
    "LoraModelLoader bypass": ({"strength_model": 0.5, "bypass": True}, {"strength_model": 0.6, "bypass": True}),
}
NOT_SAMPLED = {
    "TorchCompileModel",  # compiles for a minute
    "ModelComputeDtype",
    "APG",  # keeps a running average in what it puts on, so that it is another one after each sampling
}


@pytest.mark.parametrize("name", NODES)
def test_what_a_stock_node_puts_on_a_model_counts(comfyui: ComfyUI, fresh: Any, who: Any, name: str) -> None:
    """Twice the same is the same, also after it has been sampled."""
    node = name.partition(" ")[0]

    def put_on(model: Any, settings: dict[str, Any], seed: int = 0) -> Any:
        more = {"lora": random_lora(comfyui, model, 0.5, 4, seed)} if node == "LoraModelLoader" else {}
        return apply(comfyui, node, model=model, **more, **settings)

    model = fresh("MODEL")
    plain, (one, other) = who(model), NODES[name]
    first, second = put_on(model, one), put_on(model, one)
    before = who(first)
    assert before == who(second) != plain and before == who(first.clone())
    assert who(put_on(model, other)) not in (before, plain)
    if node == "LoraModelLoader":
        assert who(put_on(model, one, seed=1)) not in (before, plain)
    if node not in NOT_SAMPLED:
        drawn(comfyui, first)
        assert (who(first), who(second), who(model)) == (before, before, plain)
        to_device(comfyui, second)
        assert (who(first), who(second), who(model)) == (before, before, plain)
        off_device(comfyui)
    assert (who(first), who(second), who(model)) == (before, before, plain)
    assert who(put_on(fresh("MODEL"), one)) == before


def test_a_bypass_lora_in_fp32_is_the_same_after_it_was_put_in(comfyui: ComfyUI, who: Any) -> None:
    """ComfyUI brings its tensors to the weights' dtype when it first puts them in, for good."""
    model = toy.z_image(torch.bfloat16, torch.float32)
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    put_on = apply(comfyui, "LoraModelLoader", model=model, lora=lora, strength_model=1.0, bypass=True)
    before = who(put_on)
    to_device(comfyui, put_on)
    hooks = [hook for injection in put_on.injections["bypass_lora"] for hook in hooks_of(injection)]
    assert any(hook.adapter.weights[0].dtype == torch.bfloat16 for hook in hooks)
    assert who(put_on) == before
    off_device(comfyui)
    assert who(put_on) == before


def hooks_of(injection: Any) -> list[Any]:
    (manager,) = [cell.cell_contents for cell in injection.inject.__closure__]
    return manager.hooks


def test_an_option_that_cannot_be_compared_is_another_model_each_time(
    comfyui: ComfyUI, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    identity = comfyui.module("nodes.comfy_host.identity")
    other = model.clone()
    other.model_options["transformer_options"]["own"] = iter([1])
    one, two = (comfyui.call(identity.identity_of, other) for _ in range(2))
    assert one.digest != two.digest and one.unknown == two.unknown == ("builtins.list_iterator",)
    assert "list_iterator" in caplog.text and "list_iterator" in "".join(one.notes)
    assert not comfyui.call(identity.identity_of, model).notes


def test_a_model_that_an_option_leads_to_counts(comfyui: ComfyUI, fresh: Any, who: Any) -> None:
    """And one that leads back to itself ends."""
    model, second = fresh("MODEL"), fresh("klein")

    def leading_to(value: Any) -> Any:
        other = model.clone()
        other.model_options["transformer_options"]["own"] = lambda: (value, other, other.model)
        return other

    to_klein, to_clip = leading_to(second), leading_to(fresh("CLIP"))
    digests = [who(model), who(to_klein), who(to_clip), who(leading_to(model)), who(leading_to(1))]
    assert len(set(digests)) == len(digests)
    to_device(comfyui, second, model)
    assert who(to_klein) == digests[1] == who(leading_to(fresh("klein")))
    off_device(comfyui)
    assert who(to_klein) == digests[1]


# -- another process --------------------------------------------------------------------------------------------------


def portraits(comfyui: ComfyUI) -> dict[str, str]:
    """Identities of the demo's models with things put on, computed in whatever process this is."""
    who, demo = identities(comfyui), comfyui.module("nodes.comfy_host.demo_models")
    model, clip, vae, vision = (
        comfyui.call(torch.inference_mode()(getattr(demo, f"load_{kind}")))
        for kind in ("model", "clip", "vae", "vision")
    )
    lora = random_lora(comfyui, model, 0.5, 4, 0)
    put_on = {
        name: apply(comfyui, name.partition(" ")[0], model=model, **({"lora": lora} if "Lora" in name else {}), **one)
        for name, (one, _) in NODES.items()
    }
    return {"encoder": who(clip, vae, vision), "plain": who(model)} | {n: who(value) for n, value in put_on.items()}


SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}]
import conftest
from inprocess import ComfyUI, new_base
from pathlib import Path
comfyui = ComfyUI(new_base(Path({base!r})))
import test_identity_contents
print("PORTRAITS" + json.dumps(test_identity_contents.portraits(comfyui)))
comfyui.close()
"""


@pytest.mark.long
def test_after_a_restart_all_are_the_same(comfyui: ComfyUI, tmp_path: Path) -> None:
    """In another folder, with another order of sets, and on a CPU whatever this runs on."""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "DOPSD_TEST_GPU": ""}
    script = SCRIPT.format(tests=tests, base=str(tmp_path))
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("PORTRAITS")] or [run.stderr[-2000:]]
    assert json.loads(line.removeprefix("PORTRAITS")) == portraits(comfyui)
