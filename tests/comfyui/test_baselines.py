"""The baselines in D-OPSD Train LoRA: class images with progress and cancel, undistilled checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import training
from inprocess import ComfyUI
from loras import give_values
from runs import Run
from safetensors import safe_open
from test_training_settings import with_settings


def baseline(comfyui: ComfyUI, run_name: str, objective: str, **widgets: Any) -> dict[str, Any]:
    return with_settings(comfyui, run_name, objective=objective, batch_size=1, **widgets)


def dreambooth(comfyui: ComfyUI, run_name: str, **widgets: Any) -> dict[str, Any]:
    return baseline(comfyui, run_name, "dreambooth", **{"dreambooth_class_images": 3, **widgets})


def folder_of(comfyui: ComfyUI, run_name: str) -> Path:
    (folder,) = (comfyui.output / "dopsd").glob(f"{run_name}-*")
    return folder


def drawing_texts(run: Run) -> list[str]:
    return [text.splitlines()[0] for text in run.texts("train") if "draws class images" in text]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(comfyui: ComfyUI) -> Run:
    run = comfyui.execute(dreambooth(comfyui, "db"))
    assert run.status == "success", run.error
    return run


def test_dreambooth_trains_on_images_that_the_node_draws_first(comfyui: ComfyUI, trained: Run) -> None:
    assert drawing_texts(trained)[0] == "the untouched model draws class images: 0 of 3"
    reports = log_of(folder_of(comfyui, "db"))
    assert [row["step"] for row in reports] == [1, 2]
    for row in reports:
        assert row["loss"] == pytest.approx(row["concept_loss"] + row["prior_loss"])
    assert any(value.abs().max() > 0 for key, value in trained.value("train").items() if ".lora_B." in key)
    text = trained.texts("train")[-1]
    assert "prior anchors are not used" not in text  # their captions are what is drawn from
    assert "the teacher is only used by the gap and the previews: the objective is dreambooth" in text


def test_they_are_what_the_users_model_draws(comfyui: ComfyUI, trained: Run) -> None:
    """The cached latents, drawn again by the MODEL without any adapter."""
    images = comfyui.core("training.class_images")
    host, rollout = comfyui.module("nodes.comfy_host.denoiser"), comfyui.core("rollout")
    place = comfyui.module("nodes.comfy_host.paths").condition_cache()
    cache = comfyui.core("conditioning.cache").ConditionCache(place)
    folder, conditions, model = folder_of(comfyui, "db"), trained.value("conditions"), trained.value("models")
    config = comfyui.core("config").TrainConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "lora.safetensors", "pt") as file:
        fingerprint = file.metadata()["dopsd_base_fingerprint"]
    planned = images.plan_class_images(config, conditions.data, fingerprint, 2)
    assert len(planned) == 3

    def draw(image: Any) -> torch.Tensor:
        denoiser = host.ComfyDenoiser(model)
        generator = comfyui.core("training.rng").make_generator(config.seed, "class image", image.number)
        noise = torch.randn(1, *image.shape, generator=generator).to(denoiser.device)
        with torch.inference_mode(), denoiser.loaded((1, *image.shape)):
            return rollout.sample(denoiser, [conditions.data.anchors[image.anchor]], noise, image.sigmas)[0].cpu()

    for image in planned:
        torch.testing.assert_close(cache.load(image.key)["latent"], comfyui.call(draw, image), rtol=1e-3, atol=1e-4)


def test_another_learning_rate_takes_them_from_the_cache(comfyui: ComfyUI, trained: Run) -> None:
    run = comfyui.execute(dreambooth(comfyui, "db_lr", lr=1e-3), keep_cache=True)
    assert run.status == "success", run.error
    assert drawing_texts(run) == ["the untouched model draws class images: 3 of 3"]


def test_cancelled_while_drawing_it_resumes_and_ends_as_if_it_had_not_been(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui.module("nodes.comfy_host.watcher"), "_TEXT_INTERVAL", 0.0)

    def cancel(event: Any) -> None:
        if event.kind == "text" and "draws class images: 2 of 3" in event.data["text"]:
            comfyui.interrupt()

    cut_graph, whole_graph = dreambooth(comfyui, "db_cut"), dreambooth(comfyui, "db_whole")
    for graph in (cut_graph, whole_graph):
        graph["train"]["inputs"]["seed"] = 5
    cut = comfyui.execute(cut_graph, keep_cache=True, on_event=cancel)
    assert cut.status == "interrupted"
    assert "no steps are saved, 2 class images are kept" in cut.texts("train")[-1]
    again = comfyui.execute(cut_graph, keep_cache=True)
    assert again.status == "success", again.error
    assert drawing_texts(again)[0] == "the untouched model draws class images: 2 of 3"
    other = comfyui.execute(whole_graph, keep_cache=True)
    assert drawing_texts(other) == ["the untouched model draws class images: 3 of 3"]
    one, two = again.value("train"), other.value("train")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("form", ["no_reference", "dpo"])
def test_pso_trains_in_both_forms(comfyui: ComfyUI, form: str) -> None:
    name = f"pso_{form}"
    run = comfyui.execute(baseline(comfyui, name, "pso", pso_form=form, pso_loser_images=2), keep_cache=True)
    assert run.status == "success", run.error
    assert all(row["loser_loss"] > 0 for row in log_of(folder_of(comfyui, name)))


@pytest.mark.parametrize("objective", ["dreambooth", "pso"])
def test_without_anchor_captions_the_node_refuses(comfyui: ComfyUI, trained: Run, objective: str) -> None:
    conditions = trained.value("conditions")
    bare = dataclasses.replace(conditions, data=dataclasses.replace(conditions.data, anchors=()))
    graph = baseline(comfyui, f"none_{objective}", objective)
    graph["conditions"] = give_values(comfyui, ("DOPSD_CONDITIONS",), [bare])
    run = comfyui.execute(graph)
    assert run.status == "error"
    assert f"objective {objective} draws class images from the anchor captions, and there are none" in run.error
    assert not list((comfyui.output / "dopsd").glob(f"none_{objective}-*/config.json"))


def test_an_ablation_runs_and_says_that_its_teacher_is_not_used(comfyui: ComfyUI) -> None:
    graph = baseline(comfyui, "ablation", "dopsd", states="data", regression_target="ground_truth")
    run = comfyui.execute(graph, keep_cache=True)
    assert run.status == "success", run.error
    assert (
        "the teacher is only used by the gap and the previews: the objective is dopsd with ground_truth"
        in (run.texts("train")[-1])
    )


def test_sft_may_train_an_undistilled_checkpoint_and_the_lora_names_it(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui.module("nodes.train_lora"), "base_name", lambda *_: "z_image_bf16.sft")
    notes = {}
    for objective in ("sft", "dopsd", "dreambooth"):
        graph = baseline(comfyui, f"base_{objective}", objective, dreambooth_class_images=1)
        run = comfyui.execute(graph, keep_cache=True)
        assert run.status == "success", run.error
        notes[objective] = run.texts("train")[-1]
    looks = "z_image_bf16.sft looks like an undistilled checkpoint (by its name): "
    assert f"{looks}sft trains it; use the LoRA on the distilled model (z_image_turbo_bf16" in notes["sft"]
    for objective in ("dopsd", "dreambooth"):  # whose class images are drawn in few steps
        assert f"{looks}D-OPSD needs one that was distilled" in notes[objective]
    with safe_open(folder_of(comfyui, "base_sft") / "lora.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["dopsd_base_model"], facts["dopsd_undistilled"]) == ("z_image_bf16.sft", "by its name")


def test_a_distilled_one_is_not_named_undistilled(comfyui: ComfyUI, trained: Run) -> None:
    with safe_open(folder_of(comfyui, "db") / "lora.safetensors", "pt") as file:
        assert "dopsd_undistilled" not in file.metadata()


def test_former_graphs_can_choose_them(comfyui: ComfyUI) -> None:
    """The hidden input of release 0.2 has the same choices as Training Settings."""
    run = comfyui.execute(training("former", steps=1, warmup=0, preview_every=0, probe_every=0, objective="pso"))
    assert run.status == "success", run.error
    assert json.loads((folder_of(comfyui, "former") / "config.json").read_text())["objective"]["name"] == "pso"
