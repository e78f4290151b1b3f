"""LoRA files along the way: the node offers the best one, and Compare LoRA draws all of a run as a strip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import training
from inprocess import ComfyUI
from runs import Run

TILE, LEFT, TOP, STEP = 128, 210, 44 + 17, 128 + 6  # the grid's geometry for 64x64 images


def saving(comfyui: ComfyUI, run_name: str, **widgets: Any) -> dict[str, Any]:
    """A training of 6 steps with Training Settings that keeps a LoRA every 2 steps."""
    graph = training(run_name)
    schema = comfyui.pack_nodes["DOPSD_TrainingSettings"].define_schema()
    table = next(entry for entry in schema.inputs if entry.id == "model_family").extra_dict["dopsd_fill"]
    short = {"rank": 4, "alpha": 4.0, "warmup": 1, "probe_every": 2, "save_every": 2, **widgets}
    shown = {"model_family": "Z-Image-Turbo", "preset": "demo model"}
    shown |= table["Z-Image-Turbo"]["demo model"] | short
    graph["settings"] = {"class_type": "DOPSD_TrainingSettings", "inputs": shown}
    kept = ("model", "conditions", "vae", "run_name", "preset", "seed", "memory")
    inputs = {name: value for name, value in graph["train"]["inputs"].items() if name in kept}
    graph["train"]["inputs"] = {**inputs, "steps": 6, "preview_every": 0, "settings": ["settings", 0]}
    return graph


def comparing(**inputs: Any) -> dict[str, Any]:
    settings = {
        "model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "prompts": "a badge\na red badge",
        "strengths": "1", "seed": 7, "steps": 2, "width": 64, "height": 64, "lora_name": "none", **inputs,
    }  # fmt: skip
    models = {"class_type": "DOPSD_LoadDemoModels", "inputs": {}}
    return {"models": models, "compare": {"class_type": "DOPSD_CompareLoRA", "inputs": settings}}


@pytest.fixture(scope="module")
def strip(comfyui: ComfyUI) -> Run:
    """A training, and Compare LoRA of its run_folder."""
    graph = saving(comfyui, "strip")
    graph |= {"compare": comparing(run_folder=["train", 2])["compare"]}
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    return run


def cell(image: torch.Tensor, row: int, column: int) -> torch.Tensor:
    y, x = TOP + row * STEP, LEFT + column * STEP
    return image[0, y : y + TILE : 2, x : x + TILE : 2]


def folder_of(run: Run) -> Path:
    return Path(run.value("train", 2))


def report_of(run: Run) -> dict[str, Any]:
    return json.loads((folder_of(run) / "report.json").read_text(encoding="utf-8"))


def test_the_best_one_is_offered(comfyui: ComfyUI, strip: Run) -> None:
    report, last = report_of(strip), strip.texts("train")[-1]
    assert report["best_lora"] == f"loras/step-{report['best_step']:06d}.safetensors"
    assert (
        f"smallest gap on the unseen prompt: {report['best_heldout_relative_gap']:.3f} at step {report['best_step']}; "
        f"output/dopsd/{folder_of(strip).name}/{report['best_lora']}"
    ) in last.splitlines()


def best_of(comfyui: ComfyUI, folder: Path, step: int) -> tuple[Any, Any]:
    """The result of a run in this folder whose best step is this one, and its configuration."""
    config = comfyui.core("config").TrainConfig.from_json((folder / "config.json").read_text("utf-8"))
    path = comfyui.core("training.saved_loras").lora_of_step(folder, step)
    best = comfyui.core("training.unseen_gap").BestStep(step, 0.5, path)
    (last, *_) = comfyui.core("training.checkpoint").saved_steps(folder / "checkpoints")
    checkpoint = folder / "checkpoints" / f"step-{last:06d}"
    kind = comfyui.core("training.trainer").TrainResult
    return kind(last, False, folder / "lora.safetensors", checkpoint, None, None, best), config


def test_the_best_lora_is_the_file_of_its_step(comfyui: ComfyUI, strip: Run) -> None:
    module = comfyui.module("nodes.comfy_host.training")
    saved = comfyui.core("training.saved_loras").saved_loras(folder_of(strip))
    assert [one.step for one in saved] == [2, 4, 6]
    result, config = best_of(comfyui, folder_of(strip), 2)
    given = module.best_lora(result, config)
    tensors, header = comfyui.core("adapters.lora_file").read_safetensors(saved[0].path)
    assert given.keys() == tensors.keys() and all(torch.equal(given[key], tensors[key]) for key in tensors)
    assert given.facts["dopsd_step"] == "2" and "modelspec.hash_sha256" not in given.facts
    assert header["modelspec.title"] == "strip, step 2"
    assert given.keys() == module.trained_lora(result, config).keys()


def test_without_files_it_is_the_trained_lora_and_the_best_step_is_named(comfyui: ComfyUI) -> None:
    run = comfyui.execute(saving(comfyui, "unsaved", save_every=0))
    assert run.status == "success", run.error
    lora, best = run.value("train", 0), run.value("train", 4)
    assert lora.keys() == best.keys() and all(torch.equal(lora[key], best[key]) for key in lora)
    assert report_of(run)["best_lora"] == "" and report_of(run)["best_step"] in (2, 4, 6)
    assert not (folder_of(run) / "loras").exists()


def test_a_run_is_drawn_as_a_strip_of_its_steps(comfyui: ComfyUI, strip: Run) -> None:
    image = strip.value("compare")
    assert strip.of("progress", "compare")[-1].data["max"] == 2 * 4  # two prompts, without and at three steps
    assert strip.texts("compare")[0].startswith("step-000006.safetensors: ")
    for column, step in ((1, 2), (3, 6)):
        lora = folder_of(strip) / "loras" / f"step-{step:06d}.safetensors"
        tensors, _ = comfyui.core("adapters.lora_file").read_safetensors(lora)
        from loras import give

        alone = comfyui.execute({"0": give(comfyui, tensors), **comparing(lora=["0", 0])})
        assert alone.status == "success", alone.error
        for row in range(2):
            assert torch.equal(cell(image, row, column), cell(alone.value("compare"), row, 1))
            assert torch.equal(cell(image, row, 0), cell(alone.value("compare"), row, 0))


@pytest.mark.long
def test_a_run_is_found_by_its_name_and_what_it_replaces_is_named(comfyui: ComfyUI, strip: Run) -> None:
    from loras import demo_lora, give

    name = folder_of(strip).name
    for text in (name, f"output/dopsd/{name}"):
        graph = comparing(run_folder=text, lora=["0", 0], strengths="0.5, 1", prompts="a badge")
        run = comfyui.execute({"0": give(comfyui, demo_lora(comfyui)), **graph})
        assert run.status == "success", run.error
        assert "the connected lora is not used: run_folder is given" in run.texts("compare")[0]
        assert run.of("progress", "compare")[-1].data["max"] == 1 + 3 * 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nowhere-00000000", "there is no run 'nowhere-00000000' in output/dopsd"),
        ("../secret", "is not in output/dopsd"),
        ("/etc", "is not in output/dopsd"),
        ("C:\\windows", "is not in output/dopsd"),
        ("a/b/strip", "is not in output/dopsd"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(comfyui: ComfyUI, text: str, sentence: str) -> None:
    run = comfyui.execute(comparing(run_folder=text))
    assert run.status != "success" and sentence in str(run.error)


def test_a_run_without_files_says_what_to_set(comfyui: ComfyUI) -> None:
    folder = comfyui.output / "dopsd" / "bare-00000000"
    folder.mkdir(parents=True)
    run = comfyui.execute(comparing(run_folder=folder.name))
    assert "output/dopsd/bare-00000000 has no LoRA files along the way: set save_every" in str(run.error)


def test_of_many_files_some_are_drawn(comfyui: ComfyUI) -> None:
    evenly = comfyui.module("nodes.comfy_host.lora_columns").evenly
    assert evenly(range(5), 12) == [0, 1, 2, 3, 4]
    assert evenly(range(100), 3) == [0, 50, 99] and evenly(range(9), 1) == [8]


# -- a run that watches itself -----------------------------------------------------------------------------------------


def test_what_the_run_says_of_itself_is_a_note(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "burn: the student's velocities are 1.20 times as large"
    monkeypatch.setattr(comfyui.core("training.health"), "burning", lambda reports, batches: line)
    run = comfyui.execute(saving(comfyui, "burning", save_every=0))
    assert run.texts("train")[-1].splitlines().count(line) == 1 and report_of(run)["notes"].count(line) == 1


def test_a_plateau_ends_the_run_and_the_report_says_why(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    health = comfyui.core("training.health")
    monkeypatch.setattr(health, "is_plateau", lambda reports, patience, *_: reports[-1].step == 4 and patience == 3)
    for _ in range(2):  # also when it is run again
        run = comfyui.execute(saving(comfyui, "flat", stop_at_plateau=3))
        assert run.status == "success", run.error
        text, report = run.texts("train")[-1], report_of(run)
        assert text.startswith("4 steps done") and "already done" not in text
        assert report["state"] == "finished" and report["step"] == 4
        assert (
            sum(note.startswith("stopped at step 4 of 6: each of the last 3 measurements") for note in report["notes"])
            == 1
        )


@pytest.mark.long
def test_a_lora_put_in_the_place_of_the_runs_is_not_given_out(
    comfyui: ComfyUI, caplog: pytest.LogCaptureFixture
) -> None:
    """The finished run again, after its files were replaced by another run's: the same LoRA comes back, and notes."""
    graph = saving(comfyui, "replaced")
    first, other = comfyui.execute(graph), comfyui.execute(saving(comfyui, "other", rank=2, alpha=2.0))
    assert (first.status, other.status) == ("success", "success"), (first.error, other.error)
    folder = folder_of(first)
    strangers = (folder_of(other) / "lora.safetensors").read_bytes()
    step_2 = folder / "loras" / "step-000002.safetensors"
    for path in (folder / "lora.safetensors", step_2):
        path.write_bytes(strangers)
    again = comfyui.execute(graph)
    assert again.status == "success", again.error
    lora, wanted = again.value("train"), first.value("train")
    assert all(torch.equal(lora[key], wanted[key]) for key in wanted) and lora.facts == wanted.facts
    text = again.texts("train")[-1]
    assert "lora.safetensors was not written by this run: it is now lora-of-another-run.safetensors" in text
    assert (folder / "lora-of-another-run.safetensors").read_bytes() == strangers
    best, config = best_of(comfyui, folder, 2)
    module = comfyui.module("nodes.comfy_host.training")
    for damaged in (False, True):
        step_2.write_bytes(strangers[: -100 if damaged else None])
        given = module.best_lora(best, config)
        assert all(torch.equal(given[key], wanted[key]) for key in wanted)
        assert "step-000002.safetensors" in caplog.messages[-1]
        assert "best_lora is the LoRA of step 6 instead" in caplog.messages[-1]
    step_2.write_bytes(strangers)
    compared = comfyui.execute(comparing(run_folder=folder.name))
    assert compared.status == "success", compared.error
    assert "step-000002.safetensors is not as the run wrote it" in compared.texts("compare")[-1]
