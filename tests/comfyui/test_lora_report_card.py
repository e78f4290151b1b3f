"""LoRA Report Card: what it reports is what ComfyUI's own nodes draw, and the model stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import training
from loras import demo_lora, give
from PIL import Image

ORDINARY = "a red star badge, left, on a navy background"
PROMPTS = f"a [V] badge, right, on a forest background\n{ORDINARY}"


@pytest.fixture(scope="module")
def tensors(comfyui) -> dict[str, torch.Tensor]:
    return demo_lora(comfyui)


def graph(comfyui, lora: Any, conditions: bool = False, **inputs: Any) -> dict:
    """Nodes "models", "data", "conditions" if wanted, "lora", "card"."""
    nodes = training()
    del nodes["train"]
    if not conditions:
        del nodes["conditions"]
    settings = {
        "model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "dataset": ["data", 0],
        "prompts": PROMPTS, "strengths": "0.5, 1", "images_per_prompt": 1, "resolution": 64,
        **({"conditions": ["conditions", 0]} if conditions else {}), **inputs,
    }  # fmt: skip
    if lora is not None:
        nodes["lora"], settings["lora"] = give(comfyui, lora), ["lora", 0]
    return {**nodes, "card": {"class_type": "DOPSD_LoRAReportCard", "inputs": settings}}


def report_of(run) -> dict[str, Any]:
    assert run.status == "success", run.error
    return json.loads(run.value("card", 1), parse_constant=lambda word: pytest.fail(word))


def drawn_by_stock_nodes(comfyui, prompt: str, seed: int, tensors: dict | None) -> torch.Tensor:
    """[64, 64, 3]: the same image by ComfyUI's loader, the Few-Step Sampler and VAE Decode."""
    sampling = {"seed": seed, "steps": 0, "width": 64, "height": 64, "batch_size": 1, "sampler": "euler"}
    nodes = {
        "1": {"class_type": "DOPSD_LoadDemoModels", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": prompt}},
        "3": {"class_type": "DOPSD_FewStepSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0], **sampling}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    if tensors is not None:
        nodes["6"] = give(comfyui, tensors)
        wanted = {"model": ["1", 0], "lora": ["6", 0], "strength_model": 0.5, "bypass": False}
        nodes["7"] = {"class_type": "LoraModelLoader", "inputs": wanted}
        nodes["3"]["inputs"]["model"] = ["7", 0]
    run = comfyui.execute(nodes)
    assert run.status == "success", run.error
    return run.value("4")[0].clamp(0, 1)


@pytest.mark.long
def test_retention_is_that_of_the_stock_nodes_images(comfyui, tensors, artefacts) -> None:
    run = comfyui.execute(graph(comfyui, tensors))
    report = report_of(run)
    image = run.value("card")
    comfyui.core("image_grid").to_images(image.permute(0, 3, 1, 2))[0].save(artefacts / "report_card.png")
    assert report["strengths"] == [0.5, 1.0] and image.shape[1] > 400 and run.outputs["card"]["images"]
    found = report["measures"]["pixel_retention"]
    assert found["prompts"] == [ORDINARY]
    (shot,) = [shot for shot in report["images"] if shot["prompt"] == ORDINARY]
    before, after = (drawn_by_stock_nodes(comfyui, ORDINARY, shot["seed"], lora) for lora in (None, tensors))
    wanted = float((before - after).square().mean().sqrt())
    assert wanted > 0.01 and found["strengths"]["0.5"]["values"] == pytest.approx([wanted], abs=1e-4)
    assert list(report["measures"]) == ["sharpness", "sharpness_prior", "pixel_retention"]
    text = run.texts("card")[-1]
    assert f"{len(tensors)} of {len(tensors)} tensors fit" in text and "following is not measured" in text
    assert "conditions is not connected" in text
    bar = run.of("progress", "card")[-1].data
    # 6 images of four variants; three measures of 5, 1 and 1 images
    assert bar["value"] == bar["max"] == 4 * 6 + 4 * (5 + 1 + 1)


@pytest.mark.long
def test_the_gap_is_one_before_training(comfyui, tensors) -> None:
    nothing = {key: torch.zeros_like(value) if ".lora_B." in key else value for key, value in tensors.items()}
    gap = report_of(comfyui.execute(graph(comfyui, nothing, conditions=True, strengths="1")))["measures"]["teacher_gap"]
    assert gap["untouched"]["mean"]["mean"] == pytest.approx(1)
    assert gap["strengths"]["1"]["values"] == pytest.approx(gap["untouched"]["values"], rel=1e-4)
    other = report_of(comfyui.execute(graph(comfyui, tensors, conditions=True, strengths="1")))["measures"]
    assert other["teacher_gap"]["strengths"]["1"]["mean"]["mean"] != pytest.approx(1, rel=0.02)
    assert other["teacher_gap"]["untouched"]["values"] == pytest.approx(gap["untouched"]["values"], rel=1e-4)


def test_a_trained_lora_closes_the_gap(comfyui) -> None:
    nodes = training("for-card", steps=12, preview_every=0, rank=8)
    card = graph(comfyui, None, conditions=True, strengths="1")["card"]
    card["inputs"]["lora"] = ["train", 0]
    run = comfyui.execute({**nodes, "card": card})
    gap = report_of(run)["measures"]["teacher_gap"]
    assert gap["strengths"]["1"]["mean"]["mean"] < 0.98
    trained = {pair.captions[0] for pair in run.value("data").report.pairs}
    assert not set(gap["prompts"]) & trained


@pytest.mark.long
def test_the_model_is_as_it_was(comfyui, tensors) -> None:
    run = comfyui.execute(graph(comfyui, tensors, conditions=True, strengths="1, -2"))
    report_of(run)
    model = run.value("models")
    assert not model.patches
    denoisers = comfyui.module("nodes.comfy_host.denoiser")
    comfyui.call(denoisers.ComfyDenoiser(model).load, (1, 16, 8, 8))  # takes ComfyUI's patches off
    fresh = comfyui.call(comfyui.module("nodes.comfy_host.demo_models").load_model)
    wanted = fresh.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.model.state_dict().items())


def test_cancelling_stops_between_images_and_leaves_the_model(comfyui, tensors) -> None:
    def cancel(event) -> None:
        if event.kind == "progress" and event.data["value"] >= 10:
            comfyui.interrupt()

    run = comfyui.execute(graph(comfyui, tensors), on_event=cancel)
    assert run.status == "interrupted"
    last = run.of("progress", "card")[-1].data  # ComfyUI reports some of the images only
    assert 10 <= last["value"] < last["max"]
    assert not run.value("models").patches


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"prompts": "a badge\na\0 \0b\0"}, "prompts: line 2: the text contains NUL characters"),
        ({"prompts": "a \x1b[31mred badge"}, "prompts: line 1: the text contains the control character U+001B"),
        ({"prompts": "a badge \ud83d"}, "prompts: line 1: the text contains half a character (U+D83D)"),
        ({"class_name": "bad\0ge"}, "class_name: the text contains NUL characters"),
        ({}, "there is no LoRA to report on: choose a file in lora_name, or connect lora"),
        ({"strengths": "0"}, "strengths: 0 is the untouched model, which is always drawn; add another"),
        ({"strengths": "strong"}, "strengths: 'strong' is not a number"),
        ({"prompts": "\n".join(f"a badge {i}" for i in range(65))}, "prompts: give at most 64 prompts"),
        ({"dino": "nowhere"}, "nowhere"),
    ],
    ids=["NUL", "control", "half", "NUL in class_name", "no lora", "zero", "words", "many", "weights"],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(comfyui, inputs, sentence) -> None:
    run = comfyui.execute(graph(comfyui, None, **inputs))
    assert run.status in ("error", "refused") and sentence in run.error and not run.of("progress", "card")


def test_another_models_lora_is_refused(comfyui) -> None:
    foreign = {f"transformer.blocks.0.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    run = comfyui.execute(graph(comfyui, foreign))
    assert run.error.startswith("none of the LoRA's 2 tensors fit this model")


def test_more_images_than_memory_holds_are_refused(comfyui, tensors) -> None:
    prompts = "\n".join(f"a badge {i}" for i in range(60))
    run = comfyui.execute(graph(comfyui, tensors, prompts=prompts, images_per_prompt=16))
    assert "would draw 4096 images, and 1000 is the limit: give fewer prompts" in run.error  # 4 captions, 4 variants
    assert not run.of("progress", "card")


def test_edits_are_refused(comfyui, tensors) -> None:
    folder = comfyui.input / "card_edits"
    for part in ("source", "target"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (9, 99, 199 if part == "source" else 20)).save(folder / part / "a.png")
    (folder / "target" / "a.txt").write_text("make it night", encoding="utf-8")
    nodes = graph(comfyui, tensors)
    nodes["data"]["inputs"]["folder"] = "card_edits"
    run = comfyui.execute(nodes)
    assert "evaluates images with captions, and this dataset contains edits" in run.error


# -- metrics -----------------------------------------------------------------------------------------------------------


def tiny_dino(folder: Path) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=16, image_size=64)).save_pretrained(folder)


@pytest.mark.long
def test_weights_in_the_models_folder_can_be_chosen(comfyui, tensors) -> None:
    weights = comfyui.module("nodes.comfy_host.metric_weights")
    folder = comfyui.base / "models" / "dopsd_metrics"
    tiny_dino(folder / "tiny-dino")
    (folder / ".hidden").mkdir(exist_ok=True)
    (folder / "readme.txt").touch()
    assert weights.weight_choices() == ["none", "tiny-dino"]
    run = comfyui.execute(graph(comfyui, tensors, strengths="1", dino="tiny-dino"))
    report = report_of(run)
    assert {"dino_d", "dino_retention"} < report["measures"].keys()
    assert (
        len(report["measures"]["dino_d"]["prompts"]) == 4
        and report["measures"]["dino_d"]["untouched"]["mean"]["mean"] > 0
    )
    assert "following is not measured" not in run.texts("card")[-1]


def test_missing_files_of_weights_are_named_before_anything_is_drawn(comfyui, tensors) -> None:
    (comfyui.base / "models" / "dopsd_metrics" / "empty").mkdir(parents=True, exist_ok=True)
    run = comfyui.execute(graph(comfyui, tensors, dino="empty"))
    assert "DINO-D: " in run.error and "has no config.json" in run.error and not run.of("progress", "card")


def test_weights_are_only_read_from_their_folder(comfyui) -> None:
    weights = comfyui.module("nodes.comfy_host.metric_weights")
    unavailable = comfyui.core("metrics.needs").MetricUnavailable
    with pytest.raises(unavailable, match="there is no ../loras in models/dopsd_metrics"):
        weights.load_chosen({"dino": "../loras"}, None, "instance")


def test_a_clip_that_cannot_answer_is_refused(comfyui, tensors) -> None:
    run = comfyui.execute(graph(comfyui, tensors, judge=["models", 1]))
    assert "the CLIP connected to judge cannot answer questions about two images: load qwen3vl_4b" in run.error
    assert not run.of("progress", "card")


def test_a_qwen3_vl_clip_is_asked_with_both_images(comfyui) -> None:
    """Its tokenizer is ComfyUI's own; the network of billions of weights answers by hand."""
    import comfy.text_encoders.qwen3vl

    tokenizer = comfy.text_encoders.qwen3vl.tokenizer("qwen3vl_4b")()
    asked: dict[str, Any] = {}

    def generate(tokens, **options):
        asked.update(tokens=tokens, **options)
        return [1, 2]

    clip = SimpleNamespace(
        cond_stage_model=SimpleNamespace(generate=generate), generate=generate,
        tokenize=lambda text, **more: tokenizer.tokenize_with_weights(text, **more),
        decode=lambda ids: "MOSTLY THE SAME" if ids == [1, 2] else "",
    )  # fmt: skip
    judge = comfyui.core("metrics.vlm_questions").VlmJudge(
        comfyui.module("nodes.comfy_host.metric_weights").ask_with(clip)
    )
    source, generated = torch.zeros(3, 32, 64), torch.ones(3, 64, 32)
    assert comfyui.call(judge, source, generated) == 3
    rows = next(iter(asked["tokens"].values()))
    images = [token[0]["data"] for row in rows for token in row if isinstance(token[0], dict)]
    assert [tuple(image.shape) for image in images] == [(1, 32, 64, 3), (1, 64, 32, 3)]
    assert float(images[0].max()) == 0 and float(images[1].min()) == 1
    assert asked["do_sample"] is False and asked["max_length"] == 32
