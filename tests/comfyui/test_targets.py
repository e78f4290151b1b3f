"""The input `targets` of D-OPSD Train LoRA: it chooses layers, says how many, and refuses what no LoRA could be of."""

from __future__ import annotations

from typing import Any

import pytest
import toy
from graphs import training
from inprocess import ComfyUI

ONE_STEP: dict[str, Any] = {"steps": 1, "warmup": 0, "preview_every": 0, "probe_every": 0}


def modules(lora: dict[str, Any]) -> set[str]:
    return {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in lora}


def test_they_choose_what_learns_and_the_node_counts_it(comfyui: ComfyUI) -> None:
    """In blocks everything may be chosen; the stock loader takes it all."""
    run = comfyui.execute(
        training("chosen", targets=r"noise_refiner.*, re:layers\.[1-2]{1,1}\..*(w1|to_q)", **ONE_STEP)
    )
    assert run.status == "success", run.error
    lora = run.value("train")
    wanted = {f"layers.{i}.{part}" for i in (1, 2) for part in ("attention.to_q", "feed_forward.w1")}
    refiner = [f"attention.to_{part}" for part in ("q", "k", "v", "out.0")] + [f"feed_forward.w{i}" for i in (1, 2, 3)]
    wanted |= {f"noise_refiner.0.{part}" for part in (*refiner, "adaLN_modulation.0")}
    assert modules(lora) == wanted
    size = f"12 modules, {sum(value.numel() for value in lora.values()) / 1e6:.1f} M parameters"
    assert all(size in text.split("\n") for text in run.texts("train"))

    loader = comfyui.nodes.NODE_CLASS_MAPPINGS["LoraModelLoader"]
    patched = comfyui.call(lambda: loader.execute(run.value("models"), lora, 1.0).args[0])
    assert sum(len(entries) for entries in patched.patches.values()) == 12


def test_none_given_by_a_graph_of_before_are_all(comfyui: ComfyUI) -> None:
    graph = training("all-of-them", **ONE_STEP)
    graph["train"]["inputs"].pop("targets", None)
    run = comfyui.execute(graph, keep_cache=True)
    assert run.status == "success", run.error
    assert len(modules(run.value("train"))) == 7 * 6
    assert run.texts("train")[-1].split("\n")[1].startswith("42 modules, ")


@pytest.mark.parametrize(
    ("targets", "reported"),
    [
        ("attention.to_q, atention.to_k", "LoRA target 'atention.to_k' matches none of the network's"),
        (
            "*",
            "target '*' matches x_embedder, which is outside the model's blocks, and not every program "
            "loads a LoRA of it: choose within noise_refiner.*, context_refiner.*, layers.*",
        ),
        ("re:layers(", "target 're:layers(' is not a regular expression"),
    ],
    ids=["nothing", "outside the blocks", "broken"],
)
def test_what_cannot_be_is_refused_before_training(comfyui: ComfyUI, targets: str, reported: str) -> None:
    run = comfyui.execute(training("refused", targets=targets, **ONE_STEP), keep_cache=True)
    assert run.status == "error" and run.error.startswith(reported), run.error
    assert not list((comfyui.output / "dopsd").glob("refused-*"))


@pytest.mark.parametrize(
    ("targets", "size"),
    [("", "238 modules, 158.8 M parameters"), ("layers.*.attention.*", "120 modules, 59.0 M parameters")],
)
def test_sizes_at_the_real_size(comfyui: ComfyUI, targets: str, size: str) -> None:
    """Rank 64; attention alone: 30 blocks of 4 projections of 3840 x 3840."""
    denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(toy.real_z_image())
    chosen = {"rank": 64, "targets": targets}
    config = comfyui.module("nodes.comfy_host.presets").make_config("standard", denoiser.family, True, chosen)
    counts = config.adapter.size(denoiser.sites())
    assert comfyui.module("nodes.comfy_host.targets").size_text(*counts) == size
