"""D-OPSD Train LoRA through the real executor: what it gives, what it leaves, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import SHORT, drawing, training
from inprocess import ComfyUI
from PIL import ImageStat
from runs import Run
from safetensors import safe_open

PROMPT = "a [V] badge, left, on a white background"


def same_tensors(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def interrupt_at(comfyui: ComfyUI, step: int) -> Any:
    def on_event(event: Any) -> None:
        if event.kind == "progress" and event.data["node"] == "train" and event.data["value"] == step:
            comfyui.interrupt()

    return on_event


@pytest.fixture(scope="module")
def trained(comfyui: ComfyUI) -> Run:
    run = comfyui.execute(training("whole"))
    assert run.status == "success", run.error
    return run


def test_gives_lora_losses_folder_and_previews(comfyui: ComfyUI, trained: Run) -> None:
    lora, loss, folder, previews = (trained.value("train", slot) for slot in range(4))
    folder = Path(folder)
    assert folder.parent == comfyui.output.resolve() / "dopsd" and folder.name.startswith("whole-")
    assert len(lora) == 2 * 7 * 6 and all(key.startswith("transformer.") for key in lora)
    assert {value.shape[0] for key, value in lora.items() if ".lora_A." in key} == {SHORT["rank"]}
    assert any(value.abs().max() > 0 for key, value in lora.items() if ".lora_B." in key)
    reports = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert loss["loss"] == [row["loss"] for row in reports if "loss" in row and not row.get("anchors")]
    assert [path.name for path in sorted((folder / "previews").iterdir())] == [
        f"step-{step:06d}.png" for step in (0, 3, 6)
    ]
    assert previews.shape[0] == 3 and previews.shape[-1] == 3 and 0.05 < previews.std() < 1
    with safe_open(folder / "lora.safetensors", "pt") as file:
        facts = file.metadata()
        for key in lora:  # the socket has in full what the file has in bf16
            assert torch.equal(file.get_tensor(key), lora[key].bfloat16()), key
    assert facts["dopsd_base_model"] == "dopsd_demo_turbo_bf16.safetensors" and facts["dopsd_step"] == "6"
    assert json.loads(facts["dopsd_config"])["steps"] == 6 and len(facts["dopsd_dataset"]) == 64


def test_shows_progress_text_and_images(trained: Run) -> None:
    values = [event.data["value"] for event in trained.of("progress", "train")]
    assert values == sorted(values) and values[-1] == SHORT["steps"]
    texts = trained.texts("train")
    assert any("step 3 of 6" in text or "left" in text for text in texts)
    assert texts[-1].startswith("6 steps done\ngap to the teacher ") and "output/dopsd/whole-" in texts[-1]
    images = trained.previews("train")
    assert len(images) == 3 and all(max(ImageStat.Stat(image).stddev) > 10 for image in images)


def test_sheets_show_who_is_said_to_draw(comfyui: ComfyUI, trained: Run) -> None:
    """Untrained, the student draws what the base draws, the teacher something else; trained, the student too."""
    tile, pad = comfyui.module("nodes.comfy_host.previews").TILE, 6

    def rows(sheet: torch.Tensor) -> list[torch.Tensor]:
        bottom = sheet.shape[0] - 2 * pad
        tops = [bottom - tile - number * (tile + pad) for number in (2, 1, 0)]
        return [sheet[top : top + tile, -(tile + pad) * 3 :] for top in tops]

    previews = trained.value("train", 3)
    base, teacher, student = rows(previews[0])
    assert torch.equal(student, base) and not torch.equal(teacher, base)
    later_base, _, later_student = rows(previews[-1])
    assert torch.equal(later_base, base) and not torch.equal(later_student, base)


def test_comfyuis_own_loader_gives_what_the_trainer_had(comfyui: ComfyUI, trained: Run) -> None:
    """At strength 1, through the stock loader, the saved LoRA draws what the student drew."""
    host, rollout = comfyui.module("nodes.comfy_host.denoiser"), comfyui.core("rollout")
    sockets = comfyui.module("nodes.comfy_host.sockets")
    loader = comfyui.nodes.NODE_CLASS_MAPPINGS["LoraModelLoader"]
    model, conditions = trained.value("models"), trained.value("conditions")
    lora = sockets.TrainedLora(trained.value("train"), {})
    patched = comfyui.call(lambda: loader.execute(model, lora, 1.0).args[0])
    prompt = conditions.previews[0]
    noise = torch.randn(1, *prompt.latent_shape, generator=torch.Generator().manual_seed(3))
    sigmas = conditions.family.sigmas(4, 64, 64)

    def drawn(with_model: Any) -> torch.Tensor:
        denoiser = host.ComfyDenoiser(with_model)
        with torch.inference_mode(), denoiser.loaded((1, 16, 8, 8)):
            return rollout.sample(denoiser, [prompt.student], noise.to(denoiser.device), sigmas)

    def drawn_by_the_student() -> torch.Tensor:
        denoiser = host.ComfyDenoiser(model)
        config = comfyui.core("adapters").Lora(rank=4, alpha=4, targets=conditions.family.lora_targets)
        with torch.inference_mode(False), torch.no_grad(), denoiser.trainable((1, 16, 8, 8)):
            sites, device = denoiser.sites(), denoiser.device
            adapters = comfyui.core("adapters.adapter_set").AdapterSet(sites, config, teacher="frozen", device=device)
            raw = {key.removeprefix("transformer."): value.float() for key, value in lora.items()}
            adapters.load_state("student", raw)
            with adapters.attached():
                return rollout.sample(denoiser, [prompt.student], noise.to(denoiser.device), sigmas)

    base, loaded, student = comfyui.call(drawn, model), comfyui.call(drawn, patched), comfyui.call(drawn_by_the_student)
    effect = (loaded - base).norm()
    assert effect > 0.01 * base.norm()
    assert (loaded - student).norm() < 1e-3 * effect


def test_interrupted_and_run_again_is_never_interrupted(comfyui: ComfyUI, trained: Run) -> None:
    graph = training("cut")
    cut = comfyui.execute(graph, on_event=interrupt_at(comfyui, 4))
    assert cut.status == "interrupted"
    (folder,) = (comfyui.output / "dopsd").glob("cut-*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
    assert (folder / "lora.safetensors").exists() and "run again" in cut.texts("train")[-1]
    again = comfyui.execute(graph)
    assert again.status == "success", again.error
    assert [event.data["value"] for event in again.of("progress", "train")][0] > 4
    assert same_tensors(again.value("train"), trained.value("train"))
    assert len(again.value("train", 1)["loss"]) == len(trained.value("train", 1)["loss"])


def test_other_settings_are_another_run_and_more_steps_are_not(comfyui: ComfyUI, trained: Run) -> None:
    other = comfyui.execute(training("whole", seed=1, preview_every=0))
    more = comfyui.execute(training("whole", steps=7, preview_every=0))
    folders = [run.value("train", 2) for run in (trained, other, more)]
    assert folders[0] == folders[2] != folders[1]
    assert [event.data["value"] for event in more.of("progress", "train")] == [7]
    assert not same_tensors(other.value("train"), trained.value("train"))


@pytest.mark.long
@pytest.mark.parametrize("ending", ["success", "error", "interrupt"])
def test_the_users_model_draws_the_same_afterwards(
    comfyui: ComfyUI, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(run: Run) -> torch.Tensor:
        return run.value("decode")

    draw = {"models": training()["models"], **drawing(PROMPT)}
    before = drawn(comfyui.execute(draw))
    assert before.std() > 0.05
    graph = training(f"base-{ending}", preview_every=2)
    if ending == "error":
        objectives = comfyui.core("objectives")
        honest = objectives.DOPSD.backward

        def failing(self: Any, inputs: Any) -> Any:
            if float(inputs.noise.flatten()[0]) == failing.noise:
                raise RuntimeError("a kernel failed, say")
            failing.count += 1
            if failing.count == 4:
                failing.noise = float(inputs.noise.flatten()[0])
                raise RuntimeError("a kernel failed, say")
            return honest(self, inputs)

        failing.count, failing.noise = 0, None
        monkeypatch.setattr(objectives.DOPSD, "backward", failing)
    run = comfyui.execute(graph, keep_cache=True, on_event=interrupt_at(comfyui, 3) if ending == "interrupt" else None)
    assert run.status == {"interrupt": "interrupted"}.get(ending, ending)
    if ending == "error":
        assert run.error == "a kernel failed, say"
    if ending != "success":
        (folder,) = (comfyui.output / "dopsd").glob(f"base-{ending}-*")
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    # the same MODEL object, from the executor's cache
    after = comfyui.execute({"models": graph["models"], **drawing(PROMPT)}, keep_cache=True)
    assert "models" in after.message("execution_cached").get("nodes", [])
    assert torch.equal(drawn(after), before)


def test_same_training_as_the_standalone_host(comfyui: ComfyUI, trained: Run, tmp_path: Path) -> None:
    """ComfyUI's network and diffusers', one core, one dataset: the same LoRA after six steps."""
    denoiser = comfyui.core("standalone.hosts.demo").load_demo_model().denoiser
    config = comfyui.core("config").TrainConfig.from_json((Path(trained.value("train", 2)) / "config.json").read_text())
    config = config.replace(steps=SHORT["steps"])  # a later test has trained that run further
    result = comfyui.core("training.trainer").train(config, denoiser, trained.value("conditions").data, tmp_path)
    ours, _ = comfyui.core("adapters.lora_file").load_lora(result.lora_path)
    theirs = {key.removeprefix("transformer."): value for key, value in trained.value("train").items()}
    assert ours.keys() == theirs.keys()
    for kind in (".lora_B.", ".lora_A."):
        one, other = (torch.cat([t[key].float().flatten() for key in sorted(t) if kind in key]) for t in (ours, theirs))
        assert (one - other).norm() < 0.02 * other.norm(), kind


def test_previews_and_rollouts_are_the_few_step_samplers(comfyui: ComfyUI, trained: Run) -> None:
    """From one noise, the core's sampling on our bridge and the node's through ComfyUI's sampler end in one latent."""
    model, conditions = trained.value("models"), trained.value("conditions")
    sampler, host = comfyui.module("nodes.comfy_host.sampling"), comfyui.module("nodes.comfy_host.denoiser")
    prompt = conditions.previews[0]
    sigmas = conditions.family.sigmas(4, 64, 64)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        import comfy.sample

        latent = torch.zeros(1, *prompt.latent_shape)
        with torch.inference_mode():
            node = sampler.few_step_sample(model, [[prompt.student.features[None], {}]], latent, 3, sigmas, "euler")
            noise = comfy.sample.prepare_noise(latent, 3)
            denoiser = host.ComfyDenoiser(model)
            with denoiser.loaded(latent.shape):
                noise = noise.to(denoiser.device)
                ours = comfyui.core("rollout").sample(denoiser, [prompt.student], noise, sigmas)
                return node, denoiser.to_vae_space(ours).cpu()

    node, ours = comfyui.call(both)
    assert node.std() > 0.1 and torch.allclose(node, ours, atol=1e-4)
