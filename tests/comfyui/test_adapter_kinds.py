"""DoRA and LoKr inside ComfyUI: files that its loaders apply at equal strength, every form of base, whole runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from bases import FORMS, SIGMA, Load, made_conditions, same, weights
from graphs import training
from inprocess import ComfyUI
from loras import give_values
from test_linears import on_the_device, whole_lora, with_lora
from test_saved_lora import HEIGHT, SEED, WIDTH, Twins, assert_same, flux2_klein, z_image
from test_training_settings import with_settings
from torch import Tensor

KINDS = {
    "dora": ("Dora", {}),
    "lokr": ("Lokr", {"factor": 4}),
    "lokr in one piece": ("Lokr", {"factor": 4, "rank": 64}),
}


def adapter_of(comfyui: ComfyUI, kind: str, targets: tuple[str, ...]) -> Any:
    name, options = KINDS[kind]
    return getattr(comfyui.core("adapters"), name)(**{"rank": 4, "alpha": 10.0, "targets": targets, **options})


def trained(comfyui: ComfyUI, denoiser: Any, kind: str) -> Any:
    """A set whose every weight does something."""
    config = adapter_of(comfyui, kind, denoiser.family.lora_targets)
    adapters = comfyui.core("adapters.adapter_set").AdapterSet(
        denoiser.sites(), config, teacher="frozen", device=denoiser.device
    )
    generator = torch.Generator().manual_seed(6)
    size = 0.1 if kind == "dora" else 0.4  # for an effect of the same order
    state = {key: t + size * torch.randn(t.shape, generator=generator) for key, t in adapters.state().items()}
    adapters.load_state("student", state)
    return adapters


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[z_image, flux2_klein], ids=["z_image", "flux2_klein"])
def pair(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Twins:
    return request.param()


def saved_lora(comfyui: ComfyUI, pair: Twins, adapters: Any) -> Any:
    """As LORA_MODEL of D-OPSD Train LoRA."""
    tensors = {f"transformer.{key}": t for key, t in adapters.config.exported(adapters.state()).items()}
    facts = {"dopsd_family": comfyui.module("nodes.comfy_host.denoiser").family_of(pair.model).name}
    return comfyui.module("nodes.comfy_host.sockets").TrainedLora(tensors, facts)


@pytest.mark.parametrize("kind", KINDS)
def test_comfyuis_loader_draws_what_the_student_draws(comfyui: ComfyUI, pair: Twins, kind: str, caplog: Any) -> None:
    """Through the file of Save LoRA and LoraLoaderModelOnly."""
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(pair.model)
    adapters = trained(comfyui, denoiser, kind)
    students = drawn_by(comfyui, pair, denoiser, adapters)
    graph = {
        "given": give_values(
            comfyui,
            ("MODEL", "CONDITIONING", "LORA_MODEL"),
            [pair.model, [[pair.features[None], {}]], saved_lora(comfyui, pair, adapters)],
        ),
        "save": {
            "class_type": "DOPSD_SaveLoRA",
            "inputs": {"lora": ["given", 2], "filename_prefix": "loras/kinds", "dtype": "fp32", "peft_folder": False},
        },
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    name = run.value("save").replace("\\", "/").rpartition("/")[2]
    graph["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["given", 0], "lora_name": name, "strength_model": 1.0},
    }
    graph["sample"] = {
        "class_type": "DOPSD_FewStepSampler",
        "inputs": {
            "model": ["lora", 0], "positive": ["given", 1], "seed": SEED, "steps": 0, "width": WIDTH, "height": HEIGHT,
            "batch_size": 1, "sampler": "euler",
        },
    }  # fmt: skip
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["sample", 0]}}
    del graph["save"]
    with caplog.at_level(logging.WARNING):
        run = comfyui.execute(graph)
    assert run.status == "success", run.error
    unread = [line for line in caplog.messages if "not loaded" in line.lower()]
    assert all(line.endswith(".lora_magnitude_vector") for line in unread)  # that is diffusers' copy of dora_scale
    assert sum(len(entries) for entries in run.value("lora").patches.values()) == pair.parts
    assert_same(pair.model.model.process_latent_in(run.value("sample")["samples"]), students)


def drawn_by(comfyui: ComfyUI, pair: Twins, denoiser: Any, adapters: Any) -> tuple[Tensor, Tensor]:
    """Latents of the untouched model, and of the student in the trainer."""
    condition = comfyui.core("conditioning.encode").Condition(pair.features)
    noise = torch.randn(1, *denoiser.family.latent_shape(WIDTH, HEIGHT), generator=torch.manual_seed(SEED))
    sigmas = denoiser.family.sigmas(pair.steps, WIDTH, HEIGHT)

    def draw() -> Tensor:
        return comfyui.core("rollout").sample(denoiser, [condition], noise, sigmas)

    with torch.inference_mode(), denoiser.loaded(noise.shape):
        base = draw()
        with adapters.attached():
            return base, draw()


@pytest.mark.parametrize("kind", KINDS)
def test_compare_lora_counts_all_of_it(comfyui: ComfyUI, pair: Twins, kind: str) -> None:
    compare = comfyui.module("nodes.comfy_host.lora_use")
    adapters = trained(comfyui, comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(pair.model), kind)
    tensors = dict(saved_lora(comfyui, pair, adapters))
    assert (
        compare.used_line("x", pair.model, tensors) == f"x: {len(tensors)} of {len(tensors)} tensors fit and are used"
    )
    wrong = {
        key: (torch.ones(5, 5) if key.endswith((".lokr_w1", ".lora_B.weight")) else t) for key, t in tensors.items()
    }
    with pytest.raises(ValueError, match="none of the LoRA's .* tensors fit this model"):
        compare.used_line("x", pair.model, wrong)


# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8 convrot", "klein fp8"])
def test_every_form_of_base_gives_its_weights_and_is_the_start(comfyui: ComfyUI, load: Load, form: str) -> None:
    model = load(form)
    before = weights(model)

    def look() -> dict[str, bool]:
        conditions = made_conditions(comfyui, model)
        denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
        pairs = conditions.data.pairs
        x = torch.randn(2, *pairs[0].target_latent.shape, generator=torch.Generator().manual_seed(4))
        found = {}
        with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), denoiser.trainable(x.shape):
            for site in denoiser.sites():
                rows = torch.randn(3, site.in_features, generator=torch.Generator().manual_seed(1))
                rows = rows.to(denoiser.device, denoiser.compute_dtype)
                with torch.no_grad():
                    product = (site.forward(rows) - site.forward(torch.zeros_like(rows))).float()
                wanted = rows.float() @ site.weight(denoiser.device).mT
                found[site.name] = bool((product - wanted).norm() < 0.1 * wanted.norm())
            base = denoiser.predict_x0(x.to(denoiser.device), SIGMA, [pair.student for pair in pairs])
            for kind in KINDS:
                config = adapter_of(comfyui, kind, denoiser.family.lora_targets)
                new = comfyui.core("adapters.adapter_set").AdapterSet(denoiser.sites(), config, device=denoiser.device)
                with new.attached():
                    out = denoiser.predict_x0(x.to(denoiser.device), SIGMA, [pair.student for pair in pairs])
                    out.square().mean().backward()
                found[kind] = torch.equal(out.detach(), base) and any(
                    p.grad is not None and bool(p.grad.any()) for p in new.parameters()
                )
        return found

    found = comfyui.call(look)
    assert [name for name, holds in found.items() if not holds] == []
    assert same(weights(model), before)
    assert set(FORMS) >= {form}


def test_dora_on_a_bypass_lora_is_refused_in_a_sentence_and_lokr_trains(comfyui: ComfyUI) -> None:
    model = on_the_device()
    bypass = with_lora(comfyui, model, whole_lora(model, 0), True)

    def look() -> None:
        denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(bypass)
        targets = denoiser.family.lora_targets
        with torch.inference_mode(), denoiser.trainable((1, 16, 8, 8)):  # ComfyUI puts it beside a loaded weight
            adapter_of(comfyui, "lokr", targets).require_sites(denoiser.sites())
            adapter_of(comfyui, "dora", targets).require_sites(denoiser.sites())

    with pytest.raises(
        ValueError, match=r"adapter dora needs the weight of layers\.0\.attention\.qkv, .* is not merged"
    ):
        comfyui.call(look)


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widgets", [{"adapter": "dora"}, {"adapter": "lokr", "factor": 4}], ids=["dora", "lokr"])
def test_a_run_by_training_settings_and_a_second_one_from_its_lora(comfyui: ComfyUI, widgets: dict[str, Any]) -> None:
    name = widgets["adapter"]
    graph = with_settings(comfyui, f"kind_{name}", **widgets)
    first = comfyui.execute(graph, keep_cache=True)
    assert first.status == "success", first.error
    lora = first.value("train")
    assert {"dora": any(k.endswith(".dora_scale") for k in lora), "lokr": all(".lokr_" in k for k in lora)}[name]
    again = with_settings(comfyui, f"kind_{name}_again", **widgets)
    again["given"] = give_values(comfyui, ("LORA_MODEL",), [lora])
    again["train"]["inputs"]["initial_lora"] = ["given", 0]
    second = comfyui.execute(again, keep_cache=True)
    assert second.status == "success", second.error
    assert "of it is not used" not in second.texts("train")[-1] and "of it are" not in second.texts("train")[-1]
    plain = training(f"kind_{name}_plain", steps=2, preview_every=0)
    plain["given"] = again["given"]
    plain["train"]["inputs"]["initial_lora"] = ["given", 0]
    refused = comfyui.execute(plain, keep_cache=True)
    assert refused.status == "error" and f"set adapter to {name}, or start from a plain LoRA" in refused.error
