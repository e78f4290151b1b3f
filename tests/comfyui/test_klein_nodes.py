"""FLUX.2-klein through our nodes in the real executor: its teachers, previews, edits; small random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import klein_twins
import pytest
import torch
import towers
from graphs import SHORT
from inprocess import ComfyUI
from loras import give_values, random_lora
from PIL import Image, ImageStat
from safetensors import safe_open

SIDE = 64
IMAGES = {"one": (200, 40, 40), "two": (40, 200, 40), "three": (40, 40, 200)}


@pytest.fixture(scope="module")
def models(comfyui: ComfyUI) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        clip, _, _ = klein_twins.clips()
        vae, _ = klein_twins.vaes()
        return {"model": klein_twins.model(3 * klein_twins.TEXT["hidden_size"]), "clip": clip, "vae": vae}

    return comfyui.call(make)


@pytest.fixture(scope="module")
def folders(comfyui: ComfyUI) -> None:
    """A concept, and edits of the same images whose sources are their negatives."""
    plain, edits = comfyui.input / "klein", comfyui.input / "klein-edits"
    for folder in (plain, edits / "source", edits / "target"):
        folder.mkdir(parents=True)
    for name, colour in IMAGES.items():
        image = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
        image.paste(colour, (16, 16, 48, 48))
        for place in (plain, edits / "target"):
            image.save(place / f"{name}.png")
            (place / f"{name}.txt").write_text(f"a [V] badge, {name}" if place == plain else f"negate it, {name}")
        image.point(lambda value: 255 - value).save(edits / "source" / f"{name}.png")


@pytest.fixture
def graph(comfyui: ComfyUI, models: dict[str, Any], folders: None) -> Callable[..., dict[str, Any]]:
    """graph(folder, teacher inputs, training inputs): from the dataset to the LoRA."""

    def make(folder: str, teacher: dict[str, Any], train: dict[str, Any] | None = None) -> dict[str, Any]:
        kinds = ("MODEL", "CLIP", "VAE")
        nodes: dict[str, Any] = {
            "given": give_values(comfyui, kinds, [models[name] for name in ("model", "clip", "vae")]),
            "data": {
                "class_type": "DOPSD_LoadDataset",
                "inputs": {"folder": folder, "resolution": SIDE, "trigger": "", "repeats": 1, "caption_dropout": 0.0},
            },
            "conditions": {
                "class_type": "DOPSD_BuildTeacherCondition",
                "inputs": {
                    "dataset": ["data", 0], "clip": ["given", 1], "vae": ["given", 2], "mode": "auto",
                    "preview_prompts": "", "anchor_prompts": "", **teacher,
                },
            },
            "look": {
                "class_type": "DOPSD_TeacherPreview",
                "inputs": {
                    "model": ["given", 0], "conditions": ["conditions", 0], "vae": ["given", 2], "seed": 0, "steps": 0,
                    "pictures": 3,
                },
            },
        }  # fmt: skip
        if train is not None:
            settings = {**defaults(comfyui), **SHORT, "preset": "quick look", "learning_rate": 2e-3, **train}
            inputs = {"model": ["given", 0], "conditions": ["conditions", 0], "vae": ["given", 2], **settings}
            nodes["train"] = {"class_type": "DOPSD_TrainLoRA", "inputs": inputs}
        return nodes

    return make


def defaults(comfyui: ComfyUI) -> dict[str, Any]:
    inputs = comfyui.pack_nodes["DOPSD_TrainLoRA"].GET_SCHEMA().inputs
    return {part.id: part.default for part in inputs if getattr(part, "default", None) is not None}


def pairs_of(run: Any) -> Any:
    assert run.status == "success", run.error
    return run.value("conditions").data.pairs


@pytest.mark.long
def test_a_whole_training_with_the_editing_branch_as_teacher(
    comfyui: ComfyUI, models: dict[str, Any], graph: Any, artefacts: Path
) -> None:
    before = state(models["model"])
    run = comfyui.execute(graph("klein", {}, {"run_name": "klein", "steps": 8, "preview_every": 4}))
    conditions, pairs = run.value("conditions"), pairs_of(run)
    assert conditions.teacher.name == "edit" and "FLUX.2-klein, teacher edit: 3 pairs" in run.texts("conditions")[0]
    for pair in pairs:
        assert not pair.student.reference_latents
        (reference,) = pair.teacher.reference_latents
        assert torch.equal(reference, pair.target_latent) and pair.target_latent.shape == (128, SIDE // 16, SIDE // 16)
        assert pair.student.features.shape[0] == pair.teacher.features.shape[0] == 512
    sheet = comfyui.core("image_grid").to_images(run.value("look").permute(0, 3, 1, 2))[0]
    sheet.save(artefacts / "klein_teacher.png")
    assert max(ImageStat.Stat(sheet).stddev) > 10 and run.value("train", 3).shape[0] == 3
    folder = Path(run.value("train", 2))
    gaps = [row["gap"] for row in map(json.loads, (folder / "train.jsonl").read_text().splitlines()) if "gap" in row]
    assert gaps[-1] < gaps[0]
    with safe_open(folder / "lora.safetensors", "pt") as file:
        facts, keys = file.metadata(), list(file.keys())
    assert facts["dopsd_teacher_sees"] == "edit"
    assert any("single_transformer_blocks.1.attn.to_out." in key for key in keys) and len(keys) == 2 * (2 * 12 + 2 * 2)
    after = state(models["model"])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def state(model: Any) -> dict[str, Any]:
    return {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}


@pytest.mark.long
def test_other_images_and_other_words(comfyui: ComfyUI, models: dict[str, Any], graph: Any) -> None:
    own = pairs_of(comfyui.execute(graph("klein", {})))
    shown = {"teacher_image": "other", "teacher_sentence": "Paint the same badge."}
    run = comfyui.execute(graph("klein", shown))
    assert run.status == "success", run.error
    data = run.value("conditions").data
    targets = [pair.target_latent for pair in own]
    for index, example in enumerate(data.examples):
        seen = [data.pairs[variant].teacher.reference_latents[0] for variant in example.variants]
        wanted = [targets[(index + step) % 3] for step in (1, 2)]
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    for pair in data.pairs:
        assert torch.equal(pair.student.features, text_features(comfyui, models, pair.caption))
        assert torch.equal(
            pair.teacher.features, text_features(comfyui, models, f"{pair.caption} Paint the same badge.")
        )
    unworded = comfyui.execute(graph("klein", {"teacher_image": "other"})).value("conditions").teacher
    assert unworded.sentence == comfyui.core("conditioning.teachers").EDIT.of_others


def text_features(comfyui: ComfyUI, models: dict[str, Any], text: str) -> torch.Tensor:
    def encode() -> torch.Tensor:
        with torch.inference_mode():
            return models["clip"].encode_from_tokens(models["clip"].tokenize(text))[0].clone()

    return comfyui.call(encode)


@pytest.mark.long
def test_edits_are_trained_from_their_sources(comfyui: ComfyUI, graph: Any, artefacts: Path) -> None:
    run = comfyui.execute(
        graph(
            "klein-edits",
            {"anchor_prompts": "make it night\nmake it winter"},
            {"run_name": "klein-edits", "batch_size": 2, "steps": 2, "preview_every": 1},
        )
    )
    pairs = pairs_of(run)
    assert run.value("conditions").teacher.name == "edit_target"
    sources = set()
    for pair in pairs:
        (source,) = pair.student.reference_latents
        assert torch.equal(pair.teacher.reference_latents[0], source) and not torch.equal(source, pair.target_latent)
        assert torch.equal(pair.teacher.reference_latents[1], pair.target_latent)
        sources.add(float(source.sum()))
    assert len(sources) == 3
    anchors = run.value("conditions").data.anchors  # each prompt alone, and for a source image
    assert {len(anchor.reference_latents) for anchor in anchors} == {0, 1}
    assert {float(latent.sum()) for anchor in anchors for latent in anchor.reference_latents} <= sources
    for prompt in run.value("conditions").previews:  # drawn from the source too
        assert len(prompt.student.reference_latents) == 1 and len(prompt.teacher.reference_latents) == 2
    assert run.value("train", 3).shape[0] == 3
    for sheets, rows in ((run.value("look"), "target"), (run.value("train", 3), "untouched")):
        sheet = comfyui.core("image_grid").to_images(sheets.permute(0, 3, 1, 2))[-1]
        sheet.save(artefacts / f"klein_edits_{rows}.png")
        assert 3.5 < sheet.height / 198 < 4.8, f"source, {rows}, teacher, student"


@pytest.mark.parametrize(
    ("folder", "teacher", "sentence"),
    [
        ("klein", {"mode": "vlm"}, "the teacher needs a vision tower: connect `vision` of Load Teacher Vision"),
        ("klein", {"mode": "edit_target"}, "the teacher edit_target is for edits, but 3 of 3 images have no source"),
        ("klein-edits", {"mode": "edit"}, "the dataset has source images, which the teacher edit does not use"),
        ("klein-edits", {"teacher_image": "other"}, "an edit has only one target: set teacher_image to own"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_anything_is_encoded(
    comfyui: ComfyUI, models: dict[str, Any], graph: Any, monkeypatch: Any, folder: str, teacher: dict, sentence: str
) -> None:
    monkeypatch.setattr(models["vae"], "encode", lambda *_: pytest.fail("the VAE was used"))
    run = comfyui.execute(graph(folder, teacher))
    assert run.status == "error" and run.error.startswith(sentence), run.error


@pytest.fixture(scope="module")
def vision(comfyui: ComfyUI) -> Any:
    """A tower as Load Teacher Vision leaves it, for the CLIPs of `towers`."""

    def make() -> Any:
        import comfy.ops

        module = comfyui.module("nodes.comfy_host.vision")
        spec = towers.tiny(module)
        tower, _ = towers.reference(spec)
        with torch.inference_mode():
            return module.new_vision(tower.state_dict(), spec, comfy.ops.manual_cast, torch.float32)

    return comfyui.call(make)


@pytest.mark.long
def test_the_vision_tower_shows_the_image_to_4b(comfyui: ComfyUI, graph: Any, vision: Any) -> None:
    nodes = graph(
        "klein",
        {"mode": "vlm", "vision": ["vlm models", 0], "clip": ["vlm models", 1]},
        {"run_name": "klein-vlm", "steps": 1, "preview_every": 0},
    )
    clip, model = comfyui.call(lambda: (towers.clip("klein"), klein_twins.model(3 * towers.WIDTH)))
    nodes["vlm models"] = give_values(comfyui, ("DOPSD_VISION", "CLIP", "MODEL"), [vision, clip, model])
    for name in ("look", "train"):
        nodes[name]["inputs"]["model"] = ["vlm models", 2]
    pairs = pairs_of(comfyui.execute(nodes))
    for pair in pairs:
        assert not pair.teacher.reference_latents and not pair.student.reference_latents
        assert pair.student.features.shape == (512, 3 * towers.WIDTH) and len(pair.teacher.features) >= 512
    assert len({float(pair.teacher.features.sum()) for pair in pairs}) == 3


def test_the_vision_tower_does_not_go_with_the_text_encoder_of_9b(comfyui: ComfyUI, graph: Any, vision: Any) -> None:
    nodes = graph("klein", {"mode": "vlm", "vision": ["vlm models", 0], "clip": ["vlm models", 1]})
    nodes["vlm models"] = give_values(
        comfyui, ("DOPSD_VISION", "CLIP"), [vision, comfyui.call(towers.clip, "klein_9b")]
    )
    run = comfyui.execute(nodes)
    assert run.status == "error" and "use the mode edit, which needs no vision tower" in run.error, run.error


def test_compare_draws_edits_of_a_reference(comfyui: ComfyUI, models: dict[str, Any]) -> None:
    """A cell without and with the LoRA is what VAE Encode, ReferenceLatent and Few-Step Sampler give."""
    lora = random_lora(comfyui, models["model"], 1.0, 4, 0)
    image = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
    given = give_values(comfyui, ("MODEL", "CLIP", "VAE", "LORA_MODEL", "IMAGE"), [*models.values(), lora, image])
    size = {"width": SIDE, "height": SIDE, "seed": 3, "steps": 0}
    nodes: dict[str, Any] = {
        "given": given,
        "compare": {
            "class_type": "DOPSD_CompareLoRA",
            "inputs": {
                "model": ["given", 0], "clip": ["given", 1], "vae": ["given", 2], "lora": ["given", 3],
                "reference": ["given", 4], "prompts": "negate it", "strengths": "1", "lora_name": "none", **size,
            },
        },
        "said": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["given", 1], "text": "negate it"}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["given", 4], "vae": ["given", 2]}},
        "edit": {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["said", 0], "latent": ["latent", 0]}},
        "sample": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {"model": ["given", 0], "positive": ["edit", 0], "batch_size": 1, "sampler": "euler", **size},
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["given", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }  # fmt: skip
    run = comfyui.execute(nodes)
    assert run.status == "success", run.error
    grid, drawn = run.value("compare")[0], run.value("decode")[0].clamp(0, 1)
    left, top, tile = 210, 44 + 17, 128
    first, second = (grid[top : top + tile : 2, x : x + tile : 2] for x in (left, left + tile + 6))
    assert torch.allclose(first, (drawn * 255).round() / 255, atol=1.5 / 255)
    assert (first - second).abs().mean() > 0.02
