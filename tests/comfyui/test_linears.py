"""Layers that are not ComfyUI's own: gradients through those that can be trained through, a name for the others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from gradient import difference, equal, gradients
from inprocess import ComfyUI
from loras import give_values, random_lora
from test_training import drawing, training
from torch import Tensor, nn

WHERE = "layers.1.feed_forward.w2"
BLOCKS = ("noise_refiner", "context_refiner", "layers")


def lists(model: Any) -> dict[str, Any]:
    return {name: getattr(model.model.diffusion_model, name) for name in BLOCKS}


def at(model: Any, path: str) -> Any:
    return model.model.diffusion_model.get_submodule(path)


def exchange(model: Any, path: str, make: Callable[[Any], nn.Module]) -> Any:
    """The MODEL with the layer at that path replaced by what `make` gives for it."""
    network, (parent, _, name) = model.model.diffusion_model, path.rpartition(".")
    with torch.inference_mode():
        setattr(network.get_submodule(parent), name, make(network.get_submodule(path)))
    return model


def linear_class(comfyui: ComfyUI, **methods: Any) -> Any:
    """ComfyUI's Linear as another pack derives it."""
    import comfy.ops

    return type("OtherLinear", (comfy.ops.manual_cast.Linear,), {"__module__": "other_pack.layers", **methods})


def derived(comfyui: ComfyUI, **methods: Any) -> Callable[[Any], nn.Module]:
    def make(old: Any) -> nn.Module:
        new = linear_class(comfyui, **methods)(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        return new

    return make


def packed(comfyui: ComfyUI) -> Callable[[Any], nn.Module]:
    """Two 4-bit values in a byte, unpacked by the layer's own forward; nothing else knows how."""

    def forward(self: Any, x: Tensor) -> Tensor:
        low, high = self.weight & 15, self.weight >> 4
        return nn.functional.linear(x, torch.stack([low, high], -1).flatten(1).to(x.dtype) * 0.01 - 0.08)

    def make(old: Any) -> nn.Module:
        new = linear_class(comfyui, forward=forward)(old.in_features, old.out_features, bias=False)
        bytes_ = torch.randint(0, 256, (old.out_features, old.in_features // 2), dtype=torch.uint8)
        new.weight = nn.Parameter(bytes_, requires_grad=False)
        return new

    return make


class Kernel(nn.Module):
    """No Linear to anyone, as the layers of an engine are."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.qweight = nn.Parameter(old.weight.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight.t().to(x.dtype)


class Wrapped(nn.Module):
    """A Linear with a LoRA of its own, as other trainers leave it in a network."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.base_layer = old

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


REFUSED = {
    "packed": (packed, "OtherLinear", "weight is"),
    "another shape": (
        lambda comfyui: derived(comfyui, cast_bias_weight=lambda self, x: (self.weight.t().to(x), None)),
        "OtherLinear",
        r"weight is \[\d+, 256\] where \[256, \d+\] is expected",
    ),
    "no way to the weight": (
        lambda comfyui: derived(comfyui, cast_bias_weight=lambda self: None),
        "OtherLinear",
        "its weight cannot be read",
    ),
    "no Linear": (lambda comfyui: Kernel, "Kernel", "it is not a Linear"),
    "wrapped": (lambda comfyui: Wrapped, "Wrapped", "it wraps the Linear feed_forward.w2.base_layer"),
}
"""Seen by looking at the layers alone."""


@pytest.fixture(params=REFUSED)
def refused(comfyui: ComfyUI, request: pytest.FixtureRequest) -> tuple[Any, str, str]:
    """A MODEL with such a layer, its class and the reason."""
    make, kind, reason = REFUSED[request.param]
    return exchange(toy.z_image(), WHERE, make(comfyui)), kind, reason


def test_a_layer_that_cannot_be_trained_through_is_named(comfyui: ComfyUI, refused: Any) -> None:
    model, kind, reason = refused
    linears = comfyui.module("nodes.comfy_host.linears")
    with pytest.raises(linears.UnknownLayer, match=rf"^{WHERE} of this MODEL is a .*\.?{kind}.*{reason}.*ComfyUI-GGUF"):
        linears.require_known_layers(model.model.diffusion_model, lists(model))


@pytest.mark.parametrize("node", ["train", "look"])
def test_the_nodes_refuse_it_before_they_do_anything(comfyui: ComfyUI, node: str) -> None:
    model = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    exchange(model, WHERE, packed(comfyui))
    graph = training("foreign", steps=2)
    graph["given"] = give_values(comfyui, ("MODEL",), [model])
    if node == "train":
        graph["train"]["inputs"]["model"] = ["given", 0]
    else:
        del graph["train"]
        inputs = {"model": ["given", 0], "conditions": ["conditions", 0], "vae": ["models", 2], "seed": 0, "steps": 0}
        graph["look"] = {"class_type": "DOPSD_TeacherPreview", "inputs": {**inputs, "pictures": 1}}
    loaded = []
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "load", lambda *_: loaded.append(True))
        run = comfyui.execute(graph)
    assert run.status == "error" and run.message("execution_error")["node_id"] == node
    assert run.error.startswith(f"{WHERE} of this MODEL is a other_pack.layers.OtherLinear") and not loaded
    assert not list((comfyui.output / "dopsd").glob("foreign-*"))


def test_a_forward_that_the_weight_does_not_explain_is_found_before_step_0(comfyui: ComfyUI) -> None:
    """The cast has the right shape; what the layer computes is something else."""

    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight.to(x))

    host, linears = comfyui.module("nodes.comfy_host.denoiser"), comfyui.module("nodes.comfy_host.linears")
    model = exchange(toy.z_image(), WHERE, derived(comfyui, forward=doubled))
    linears.require_known_layers(model.model.diffusion_model, lists(model))
    denoiser = host.ComfyDenoiser(model)
    named = pytest.raises(linears.UnknownLayer, match=rf"^{WHERE} .*OtherLinear.*its forward is not x @ W.T")
    with named, denoiser.trainable((1, 16, 8, 8)):
        pass
    assert "forward" not in at(model, "layers.1.attention_norm1").__dict__, "everything is taken off again"


def test_a_forward_that_some_node_has_replaced_is_found(comfyui: ComfyUI) -> None:
    host, linears = comfyui.module("nodes.comfy_host.denoiser"), comfyui.module("nodes.comfy_host.linears")
    model = toy.z_image()
    layer = at(model, WHERE)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 0.5
    named = pytest.raises(linears.UnknownLayer, match=f"^{WHERE} ")
    with named, host.ComfyDenoiser(model).trainable((1, 16, 8, 8)):
        pass
    layer.forward = lambda x: plain(x)
    with host.ComfyDenoiser(model).trainable((1, 16, 8, 8)):
        pass


@pytest.mark.parametrize(
    ("bent", "size"),
    [
        (lambda y: y + 0.1 * torch.tanh(y), 0.1),
        (lambda y: y + 0.1 * torch.tanh(y), 1.0),
        (lambda y: y + 0.02 * y * y.abs(), 0.1),
        (lambda y: nn.functional.leaky_relu(y, 0.8), 10.0),
        (lambda y: y.clamp(-3, 3), 1.0),
        (lambda y: 1.1 * y, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_is_almost_the_weights_is_found(
    comfyui: ComfyUI, bent: Callable[[Tensor], Tensor], size: float, dtype: torch.dtype
) -> None:
    """Its gradients would be wrong by a tenth. size: of the layer's outputs."""
    linears = comfyui.module("nodes.comfy_host.linears")
    layer, generator = linear_class(comfyui)(64, 32, bias=True), torch.Generator().manual_seed(0)
    weight, bias = size * torch.randn(32, 64, generator=generator) / 8, size * torch.randn(32, generator=generator)

    def check(function: Callable[[Tensor], Tensor]) -> None:
        def forward(x: Tensor) -> Tensor:
            return function(x @ weight.t().to(x)) + bias.to(x)

        site = SimpleNamespace(
            name="w", module=layer, in_features=64, forward=forward, grad_input=lambda grad: grad @ weight.to(grad)
        )
        linears.require_adjoints([site], torch.device("cpu"), dtype)

    check(lambda y: y)
    with pytest.raises(linears.UnknownLayer, match=r"^w of this MODEL .*its forward is not x @ W.T"):
        check(bent)


def test_a_layer_whose_activations_are_rounded_to_few_bits_trains(comfyui: ComfyUI) -> None:
    """Each token's activations in 4 bits, of the scale that it needs; so are they in the kernels of such layers."""
    linears = comfyui.module("nodes.comfy_host.linears")
    layer = linear_class(comfyui)(256, 64, bias=False)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 256, generator=generator) / 16
    layer.weight = nn.Parameter(weight, False)

    def forward(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 7
        return (x / scale).round() * scale @ weight.t().to(x)

    site = SimpleNamespace(
        name="w", module=layer, in_features=256, forward=forward, grad_input=lambda g: g @ weight.to(g)
    )
    for dtype in (torch.float32, torch.bfloat16):
        linears.require_adjoints([site], torch.device("cpu"), dtype)


def test_a_layer_of_another_class_that_computes_the_same_trains(comfyui: ComfyUI) -> None:
    wanted = gradients(comfyui, toy.z_image())
    assert equal(gradients(comfyui, exchange(toy.z_image(), WHERE, derived(comfyui))), wanted)
    own = {"cast_bias_weight": lambda self, x: (self.weight.to(x), None)}
    assert equal(gradients(comfyui, exchange(toy.z_image(), WHERE, derived(comfyui, **own))), wanted)


def test_bases_of_comfyuis_own_classes_are_not_computed_with_before_training(comfyui: ComfyUI) -> None:
    linears = comfyui.module("nodes.comfy_host.linears")
    sites = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(toy.z_image()).sites()
    forward = [SimpleNamespace(module=site.module, forward=None, grad_input=None) for site in sites]
    linears.require_adjoints(forward, torch.device("cpu"), torch.float32)


def test_a_page_is_given_back_when_the_backward_fails(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ops

    given_back: list[Any] = []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda module, *_: given_back.append(module))
    site = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(toy.z_image()).sites()[0]
    with pytest.raises(RuntimeError, match="shape"):
        site.grad_input(torch.zeros(2, site.out_features + 1))
    assert given_back == [site.module]


# -- LoRAs beside the weight ------------------------------------------------------------------------------------------


def on_the_device() -> Any:
    """A MODEL where ComfyUI computes, which is where it takes a LoRA beside a weight to."""
    import comfy.model_management
    import comfy.model_patcher

    with torch.inference_mode():
        return comfy.model_patcher.CoreModelPatcher(
            toy.z_image().model,
            comfy.model_management.get_torch_device(),
            comfy.model_management.unet_offload_device(),
        )


def with_lora(comfyui: ComfyUI, model: Any, lora: dict[str, Tensor], bypass: bool) -> Any:
    import comfy.sd

    put = comfy.sd.load_bypass_lora_for_models if bypass else comfy.sd.load_lora_for_models
    return comfyui.call(torch.inference_mode()(lambda: put(model, None, dict(lora), 1.0, 0.0)[0]))


def whole_lora(model: Any, seed: int) -> dict[str, Tensor]:
    """On Linears as they are in the network: a LoRA beside a weight cannot be one of its rows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("layers.0.attention.qkv", "layers.1.attention.qkv", "layers.1.feed_forward.w1", WHERE):
        layer = at(model, name)
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=generator) / 16
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=generator) / 2
    return tensors


def test_gradients_through_a_bypass_lora_are_those_of_the_merged_one(comfyui: ComfyUI) -> None:
    """Load LoRA (Bypass): also where a preview has ComfyUI load the MODEL again between forward and backward."""
    model = on_the_device()
    lora = whole_lora(model, 0)
    merged, bypass = with_lora(comfyui, model, lora, False), with_lora(comfyui, model, lora, True)
    base, wanted, got = (gradients(comfyui, m) for m in (model, merged, bypass))
    # some devices merge in fp16
    assert difference(base, wanted) > 0.1 and difference(got, wanted) < 2e-3
    reloading = gradients(comfyui, bypass, lambda denoiser, x: denoiser.load(x.shape))
    assert equal(reloading, got)
    del bypass
    assert equal(gradients(comfyui, model), base), "the MODEL without it is as it was"


def test_the_adapters_stay_where_they_are_when_comfyui_loads_again(comfyui: ComfyUI) -> None:
    """Loading takes a bypass LoRA out and in again; the adapters that lie over it must survive that."""
    model = on_the_device()
    bypass = with_lora(comfyui, model, whole_lora(model, 0), True)

    def look() -> tuple[bool, bool]:
        denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(bypass)
        with torch.inference_mode(), denoiser.trainable((1, 16, 8, 8)):
            adapters = comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), denoiser.family.lora_config(4))
            with adapters.attached():
                before = at(model, WHERE).forward
                denoiser.load((1, 16, 8, 8))
                stayed = at(model, WHERE).forward is before
        return stayed, "forward" in at(model, WHERE).__dict__

    assert comfyui.call(look) == (True, True)


@pytest.mark.long
def test_a_training_on_a_bypass_lora_learns_on_top_of_it(comfyui: ComfyUI) -> None:
    """The MODEL draws the same before and after."""
    graph = training("bypass", steps=2, preview_every=1)
    demo = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    lora = random_lora(comfyui, demo, 0.3, 4, 1)
    whole = {k: v for k, v in lora.items() if ".feed_forward." in k}
    graph["given"] = give_values(comfyui, ("MODEL",), [with_lora(comfyui, demo, whole, True)])
    graph["train"]["inputs"]["model"] = ["given", 0]
    drawn = comfyui.execute({**graph, **drawing("a badge", model=("given", 0))})
    assert drawn.status == "success", drawn.error
    again = comfyui.execute(
        {"models": graph["models"], "given": graph["given"], **drawing("a badge", model=("given", 0))}
    )
    assert torch.equal(again.value("decode"), drawn.value("decode"))
    assert any(value.abs().max() > 0 for key, value in drawn.value("train").items() if ".lora_B." in key)
