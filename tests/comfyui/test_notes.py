"""What the user gave and a run does not use is named: on the node while it trains, at its end, and in report.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import towers
from graphs import drawing, training
from inprocess import ComfyUI
from loras import demo_lora, give, give_values
from PIL import Image
from runs import Run

PROMPT = "a [V] badge, left, on a navy background"


def report_of(comfyui: ComfyUI, name: str) -> dict[str, Any]:
    (path,) = (comfyui.output / "dopsd").glob(f"{name}-*/report.json")
    return json.loads(path.read_text(encoding="utf-8"))


def once(line: str, text: str) -> bool:
    return sum(line in part for part in text.splitlines()) == 1


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noted(comfyui: ComfyUI) -> Run:
    """A run that is given much that it does not use."""
    foreign = {**demo_lora(comfyui, rank=4), "diffusion_model.x_embedder.diff_b": torch.ones(256)}
    facts = {"dopsd_trigger": "zwx", "dopsd_base_model": "another.safetensors"}
    graph = training("noted", preview_every=0, ema_decay=0.9, teacher="frozen", grad_steps=9, rank=4, warmup=50)
    graph["start"] = give(comfyui, comfyui.module("nodes.comfy_host.sockets").TrainedLora(foreign, facts))
    graph["shifted"] = {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["models", 0], "shift": 7.5}}
    graph["guided"] = {"class_type": "RescaleCFG", "inputs": {"model": ["shifted", 0], "multiplier": 0.5}}
    graph["train"]["inputs"] |= {"model": ["guided", 0], "initial_lora": ["start", 0]}
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    return run


LINES = (
    "ema_decay 0.9 is not used: the teacher is frozen",
    "grad_steps 9 is not used: there are 2 rollout_steps",
    "warmup 50 is cut to 5: the run has 6 steps",
    "vae is not used: preview_every is 0",
    "diffusion_model.x_embedder.diff_b",  # of initial_lora
    "initial_lora was trained with the trigger 'zwx', the dataset's is '[V7]'",
    "the MODEL's patched sampling (shift 7.5) is not used",
    "the MODEL has a guidance function, which training and previews do not use",
    "changed from the preset demo model: steps 6 instead of 60, rank 4 instead of 16, warmup 50 instead of 10, "
    "ema_decay 0.9 instead of 0.999",
)


@pytest.mark.parametrize("line", LINES)
def test_every_note_is_there_while_it_trains_at_the_end_and_in_the_report(
    comfyui: ComfyUI, noted: Run, line: str
) -> None:
    texts = noted.texts("train")
    assert once(line, texts[0]) and texts[0].startswith("step ")
    assert once(line, texts[-1]) and texts[-1].startswith("6 steps done")
    assert once(line, "\n".join(report_of(comfyui, "noted")["notes"]))


def test_the_report_says_how_the_run_went(comfyui: ComfyUI, noted: Run) -> None:
    report = report_of(comfyui, "noted")
    assert (report["state"], report["error"], report["step"], report["steps"]) == ("finished", "", 6, 6)
    assert report["relative_gap"] > 0 and f"gap to the teacher {report['relative_gap']:.3f}" in noted.texts("train")[-1]
    assert report["teacher"] == "vlm" and report["trigger"] == "[V7]" and report["memory"] == "24 GB"
    assert report["parameters"] == sum(tensor.numel() for tensor in noted.value("train").values())
    assert report["modules"] == len(noted.value("train")) / 2


def test_the_memory_plan_and_the_conditions_have_their_say(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    train = comfyui.module("nodes.comfy_host.training")
    honest, note = train.plan_memory, "3.1 GB of the weights are streamed from RAM"

    def traded(choice: str, denoiser: Any, conditions: Any, config: Any) -> Any:
        return dataclasses.replace(honest(choice, denoiser, conditions, config), notes=(note, note))

    def warned(config: Any, denoiser: Any, data: Any, folder: Path, watcher: Any, **options: Any) -> Any:
        comfyui.core("training.run").log.warning("checkpoint %s is damaged", "step-000004")
        return real(config, denoiser, data, folder, watcher, **options)

    real = train.train
    monkeypatch.setattr(train, "plan_memory", traded)
    monkeypatch.setattr(train, "train", warned)
    monkeypatch.setattr(train, "warn_if_undistilled", lambda *_: "looks like an undistilled checkpoint")
    graph = training("traded", steps=1, warmup=0, preview_every=0, probe_every=0)
    first = comfyui.execute(graph)
    conditions = dataclasses.replace(first.value("conditions"), notes=("01.txt: 9 tokens are cut off",))
    again = training("traded-2", steps=1, warmup=0, preview_every=0, probe_every=0)
    again["conditions"] = give_values(comfyui, ("DOPSD_CONDITIONS",), [conditions])
    text = comfyui.execute(again).texts("train")[-1]
    for line in (note, "checkpoint step-000004 is damaged", "undistilled checkpoint", "01.txt: 9 tokens are cut off"):
        assert once(line, text) and once(line, "\n".join(report_of(comfyui, "traded-2")["notes"]))


def test_a_condition_cache_that_cannot_be_written_is_named_on_both_nodes_and_in_the_report(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "cache"
    place.write_text("a file where the folder belongs")
    monkeypatch.setattr(comfyui.module("nodes.build_teacher_condition"), "condition_cache", lambda: place)
    run = comfyui.execute(training("uncached", steps=1, warmup=0, preview_every=0, probe_every=0))
    line = "conditions cannot be cached ("
    assert once(line, run.texts("conditions")[-1]) and once(line, run.texts("train")[-1])
    assert once(line, "\n".join(report_of(comfyui, "uncached")["notes"]))


@pytest.mark.long
def test_preview_sheets_that_are_not_in_the_output_are_named(comfyui: ComfyUI) -> None:
    """One that an earlier release left torn, and one of another size, as of a run with fewer prompts."""
    settings = {"preview_every": 1, "probe_every": 0}
    first = comfyui.execute(training("sheets", steps=2, **settings))
    folder = Path(first.value("train", 2)) / "previews"
    torn, small = folder / "step-000000.png", folder / "step-000001.png"
    torn.write_bytes(torn.read_bytes()[:100])
    Image.new("RGB", (8, 8)).save(small)
    run = comfyui.execute(training("sheets", steps=3, **settings))
    assert run.status == "success" and run.value("train", 3).shape[0] == 2, run.error
    for line in (
        "the preview sheet step-000000.png is not in the output: truncated or damaged",
        "1 preview sheets of another size are not in the output: step-000001.png",
    ):
        assert once(line, run.texts("train")[-1])
        assert once(line, "\n".join(report_of(comfyui, "sheets")["notes"]))


def test_a_run_that_is_resumed_or_was_complete_says_so(comfyui: ComfyUI) -> None:
    settings = {"preview_every": 0, "probe_every": 0}
    assert comfyui.execute(training("again", steps=2, **settings)).status == "success"
    more = comfyui.execute(training("again", steps=3, **settings))
    assert once("resumed at step 2", more.texts("train")[-1])
    same = comfyui.execute(training("again", steps=3, **settings))
    assert once("all 3 steps were already done: nothing was trained", same.texts("train")[-1])


def test_nothing_is_said_of_a_run_that_uses_everything(comfyui: ComfyUI) -> None:
    """The quickstart's own settings, shortened, and no more steps than the rest needs."""
    run = comfyui.execute(training("plain", steps=0, rank=0, warmup=0, preview_every=120), on_event=stop_at(comfyui, 1))
    assert run.status == "interrupted"
    assert report_of(comfyui, "plain")["notes"] == []


def stop_at(comfyui: ComfyUI, step: int) -> Callable[[Any], None]:
    def on_event(event: Any) -> None:
        if event.kind == "progress" and event.data["node"] == "train" and event.data["value"] >= step:
            comfyui.interrupt()

    return on_event


# -- what ends a run early ---------------------------------------------------------------------------------------------


def test_an_interrupt_keeps_the_notes_and_is_not_cached(comfyui: ComfyUI) -> None:
    graph = training("halted", preview_every=0, probe_every=0, ema_decay=0.9, teacher="frozen")
    run = comfyui.execute(graph, on_event=stop_at(comfyui, 3))
    assert run.status == "interrupted"
    text = run.texts("train")[-1]
    assert text.startswith("stopped, 3 steps are saved in output/dopsd/halted-") and "run again" in text.splitlines()[0]
    assert once(LINES[0], text) and report_of(comfyui, "halted")["state"] == "interrupted"
    again = comfyui.execute(graph, keep_cache=True)  # a shortened result would be given again
    assert again.status == "success" and report_of(comfyui, "halted")["step"] == 6


@pytest.mark.parametrize(
    ("name", "loss", "sentence"),
    [("nan", float("nan"), "the loss of step 3 is nan"), ("error", None, "a kernel failed, say")],
)
def test_an_error_says_what_is_kept_and_where(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch, name: str, loss: float | None, sentence: str
) -> None:
    objectives = comfyui.core("objectives")
    honest, calls = objectives.DOPSD.backward, []

    def failing(self: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            return honest(self, inputs)
        if loss is None:
            raise RuntimeError("a kernel failed, say")
        return dataclasses.replace(honest(self, inputs), loss=loss)

    monkeypatch.setattr(objectives.DOPSD, "backward", failing)
    run = comfyui.execute(training(f"bad-{name}", preview_every=0, probe_every=0, ema_decay=0.9, teacher="frozen"))
    assert run.status == "error" and run.error.startswith(sentence)
    kept = f"2 steps are saved in output/dopsd/bad-{name}-"
    assert loss is None or kept in run.error
    text, report = run.texts("train")[-1], report_of(comfyui, f"bad-{name}")
    assert text.startswith(f"failed, {kept}") and sentence in text.splitlines()[0] and once(LINES[0], text)
    assert report["state"] == "failed" and sentence in report["error"] and report["step"] == 2


@pytest.mark.long
def test_another_runs_folder_is_left_alone(comfyui: ComfyUI) -> None:
    settings = {"preview_every": 0, "probe_every": 0}
    assert comfyui.execute(training("longer", steps=3, **settings)).status == "success"
    before = report_of(comfyui, "longer")
    refused = comfyui.execute(training("longer", steps=2, **settings))
    assert "is already at step 3" in refused.error and "3 steps are saved in" in refused.texts("train")[-1]
    assert report_of(comfyui, "longer") == before


# -- each setting ------------------------------------------------------------------------------------------------------


def notes_of(comfyui: ComfyUI, preset: str = "standard", anchors: int = 2, heldout: bool = True, **given: Any) -> str:
    """The notes for settings of the node, the others at their defaults; 4 images, a VAE."""
    has_vae = given.pop("has_vae", True)
    schema = comfyui.pack_nodes["DOPSD_TrainLoRA"].define_schema()
    chosen = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None} | given
    own = {key: chosen[key] for key in ("steps", "seed", "preview_every") if chosen[key]}
    family = comfyui.core("families").Z_IMAGE
    data = SimpleNamespace(
        anchors=tuple(range(anchors)),
        heldout=object() if heldout else None,
        examples=[SimpleNamespace(repeats=1)] * given.pop("images", 4),
    )
    chosen = comfyui.module("nodes.comfy_host.former_inputs").former_choices(chosen) | own
    config = comfyui.module("nodes.comfy_host.presets").make_config(preset, family, bool(anchors), chosen)
    conditions = SimpleNamespace(data=data, family=family)
    return "\n".join(
        comfyui.module("nodes.comfy_host.unused").unused_settings(preset, chosen, config, conditions, has_vae)
    )


def test_a_run_of_prior_anchors_only_says_that_no_image_is_trained(comfyui: ComfyUI) -> None:
    graph = training("anchors only", steps=1, warmup=0, preview_every=0, probe_every=0, anchor_probability=1.0)
    graph["conditions"]["inputs"]["anchor_prompts"] = "a red badge"
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    lines = run.texts("train")[-1].splitlines()
    assert sum("anchor_probability is 1: every batch is a prior anchor" in line for line in lines) == 1
    assert not any("one epoch" in line for line in lines)


def test_defaults_leave_nothing_unused(comfyui: ComfyUI) -> None:
    assert notes_of(comfyui) == ""


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"ema_decay": 0.5, "teacher": "same"}, "ema_decay 0.5 is not used: the teacher is same"),
        ({"grad_steps": 5}, "grad_steps 5 is not used: there are 4 rollout_steps, and all of them get a loss"),
        ({"steps": 20, "warmup": 30}, "warmup 30 is cut to 19: the run has 20 steps"),
        ({"has_vae": False}, "preview_every 50 is not used: no vae is connected"),
        ({"preview_every": 0}, "vae is not used: preview_every is 0"),
        (
            {"heldout": False},
            "the gap is only measured on training captions: every preview prompt is a training caption",
        ),
        ({"probe_every": 0}, "the unseen prompt is not measured: probe_every is 0"),
        ({"anchor_probability": 0.0}, "the 2 prior anchors are not used: anchor_probability is 0"),
        ({"preset": "paper"}, "the 2 prior anchors are not used: anchor_probability is 0"),
        ({"anchors": 0}, "the preset's anchor_probability 0.5 is not used: there are no prior anchors"),
        ({"objective": "sft"}, "the 2 prior anchors are not used: the objective is sft"),
        ({"objective": "sft"}, "the teacher is only used by the gap and the previews: the objective is sft"),
        ({"objective": "sft", "rollout_steps": 8}, "rollout_steps 8 is only used by the gap and the previews"),
        (
            {"steps": 10, "images": 6},
            "the run is shorter than one epoch: 10 steps are about 5 samples, one epoch is 6",
        ),
        ({"learning_rate": 3e-4}, "changed from the preset standard: lr 0.0003 instead of 0.0001"),
    ],
)
def test_a_setting_that_decides_nothing_is_named(comfyui: ComfyUI, given: dict[str, Any], line: str) -> None:
    assert once(line, notes_of(comfyui, **given))


@pytest.mark.parametrize("given", [{"grad_steps": 4}, {"grad_steps": 2}, {"ema_decay": 0.9999}, {"rollout_steps": 8}])
def test_a_setting_that_is_used_is_not(comfyui: ComfyUI, given: dict[str, Any]) -> None:
    assert "not used" not in notes_of(comfyui, **given)


# -- each thing on a MODEL ---------------------------------------------------------------------------------------------


def patched(comfyui: ComfyUI, kind: str, **inputs: Any) -> Any:
    graph = {
        "models": training()["models"],
        "patched": {"class_type": kind, "inputs": {"model": ["models", 0], **inputs}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["patched", 0]}},
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    return run.value("patched")


GUIDANCE = "the MODEL has a guidance function, which training and previews do not use"
SCHEDULE = "is not used: Z-Image-Turbo is trained and sampled on its own noise schedule"


@pytest.mark.parametrize(
    ("kind", "inputs", "line"),
    [
        ("ModelSamplingAuraFlow", {"shift": 4.5}, f"the MODEL's patched sampling (shift 4.5) {SCHEDULE}"),
        ("RescaleCFG", {"multiplier": 0.7}, GUIDANCE),
        ("PerturbedAttentionGuidance", {"scale": 3.0}, GUIDANCE),
        ("DifferentialDiffusion", {}, "the MODEL has a denoising mask"),
        (
            "EasyCache",
            {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False},
            "the MODEL has the wrapper easycache",
        ),
        ("TorchCompileModel", {"backend": "inductor"}, "the MODEL has the wrapper torch.compile"),
        ("ModelSamplingAuraFlow", {"shift": 3.0}, None),  # ComfyUI's own templates set what the model has anyway
        ("TomePatchModel", {"ratio": 0.3}, None),
    ],
)
def test_what_training_does_not_use_of_a_model_is_named(
    comfyui: ComfyUI, kind: str, inputs: dict[str, Any], line: str | None
) -> None:
    patches = comfyui.module("nodes.comfy_host.model_patches")
    model = patched(comfyui, kind, **inputs)
    patches.require_own_sampling(model)
    notes = patches.unused_patches(model)
    assert notes == () if line is None else len(notes) == 1 and line in notes[0]


def test_what_nobody_knows_is_named_too(comfyui: ComfyUI) -> None:
    model = patched(comfyui, "TomePatchModel", ratio=0.3)
    model.model_options["of_another_pack"] = {"weight": 2}
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda *args: None
    model.add_wrapper_with_key("sampler_sample", None, lambda *args: None)
    notes = " ".join(comfyui.module("nodes.comfy_host.model_patches").unused_patches(model))
    for what in ("the option of_another_pack", "an attention other than torch's own", "the wrapper without a name"):
        assert what in notes


@pytest.mark.parametrize("node", ["train", "look"])
@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("ModelSamplingSD3", {"shift": 3.0}), ("ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False})],
)
def test_another_models_sampling_is_refused(comfyui: ComfyUI, node: str, kind: str, inputs: dict[str, Any]) -> None:
    """Its times are a thousandfold, or its output is read otherwise: all that is trained would be wrong."""
    graph = training("sd3", preview_every=0, probe_every=0)
    graph["look"] = {
        "class_type": "DOPSD_TeacherPreview",
        "inputs": {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2]},
    }
    graph["patched"] = {"class_type": kind, "inputs": {"model": ["models", 0], **inputs}}
    graph[node]["inputs"]["model"] = ["patched", 0]
    if node == "look":
        del graph["train"]
    run = comfyui.execute(graph)
    assert run.message("execution_error")["node_id"] == node
    assert run.error.startswith("the MODEL's sampling is patched to that of another kind of model than Z-Image-Turbo")
    assert not list((comfyui.output / "dopsd").glob("sd3-*"))


# -- the other nodes ---------------------------------------------------------------------------------------------------


def shifted(node: str, graph: dict) -> dict:
    graph["shifted"] = {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["models", 0], "shift": 6.0}}
    graph[node]["inputs"]["model"] = ["shifted", 0]
    return graph


def test_few_step_sampler_names_a_shift(comfyui: ComfyUI) -> None:
    graph = {"models": training()["models"], **drawing(PROMPT)}
    plain, other = comfyui.execute(graph), comfyui.execute(shifted("sample", graph))
    assert plain.texts("sample") == [] and SCHEDULE in other.texts("sample")[-1]
    assert torch.equal(plain.value("decode"), other.value("decode"))


def test_teacher_preview_names_what_it_does_not_use(comfyui: ComfyUI) -> None:
    graph = training()
    del graph["train"]
    graph["look"] = {
        "class_type": "DOPSD_TeacherPreview",
        "inputs": {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2], "pictures": 1},
    }
    text = comfyui.execute(shifted("look", graph)).texts("look")[-1]
    assert once(SCHEDULE, text) and "only become as good as the teacher row" in text


def test_compare_lora_names_what_it_does_not_use(comfyui: ComfyUI) -> None:
    lora = {**demo_lora(comfyui), "text_encoders.qwen.layers.0.lora_A.weight": torch.ones(2, 2)}
    graph = {
        "models": training()["models"],
        "lora": give(comfyui, lora),
        "compare": {
            "class_type": "DOPSD_CompareLoRA",
            "inputs": {
                "model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "prompts": PROMPT, "width": 64,
                "height": 64, "lora": ["lora", 0],
            },
        },
    }  # fmt: skip
    text = comfyui.execute(shifted("compare", graph)).texts("compare")[-1]
    assert "1 are not, such as text_encoders.qwen.layers.0.lora_A.weight" in text and once(SCHEDULE, text)
    compare = comfyui.module("nodes.compare_lora")
    model = patched(comfyui, "TomePatchModel", ratio=0.3)
    notes = compare.unused_inputs(model, "mine.safetensors", lora, torch.zeros(3, 8, 8, 3))
    assert notes == (
        "lora_name mine.safetensors is not read: a lora is connected",
        "of 3 reference images only the first is used",
    )
    assert compare.unused_inputs(model, compare.NONE, lora, torch.zeros(1, 8, 8, 3)) == ()


def test_load_dataset_names_a_folder_that_is_not_read(comfyui: ComfyUI) -> None:
    (comfyui.input / "chosen").mkdir(exist_ok=True)
    graph = {
        "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
        "text": {"class_type": "PrimitiveString", "inputs": {"value": "a [V] thing"}},
        "data": {
            "class_type": "DOPSD_LoadDataset",
            "inputs": {"folder": "chosen", "resolution": 64, "images": ["image", 0], "texts": ["text", 0]},
        },
    }
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    line = "the folder chosen is not read: images are connected"
    assert once(line, run.texts("data")[-1]) and once(line, run.value("data", 1))


def test_what_load_dataset_warns_of_is_in_the_report_of_the_run(comfyui: ComfyUI) -> None:
    folder = comfyui.input / "with_remarks"
    folder.mkdir(exist_ok=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (number * 99, 7, 9)).save(folder / f"{number}.png")
    rows = [{"path": f"{number}.png", "text": f"a [V] badge {number}", "mask_path": "m.png"} for number in range(2)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    graph = training("remarks", steps=1, preview_every=0, probe_every=0, warmup=0)
    graph["data"]["inputs"]["folder"] = "with_remarks/rows.jsonl"
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    line = "warning: rows.jsonl: the key 'mask_path' is not read"
    assert once(line, run.texts("train")[-1]) and line in report_of(comfyui, "remarks")["notes"]
    assert line not in run.texts("conditions")[-1]  # Load Dataset beside it shows it


def test_many_warnings_of_a_dataset_are_counted(comfyui: ComfyUI, tmp_path: Path) -> None:
    problem, dataset = comfyui.core("data.problems").Problem, comfyui.core("data.dataset")
    problems = tuple(problem("warning", tmp_path / f"{number}.png", None, "is small") for number in range(30))
    lines = comfyui.module("nodes.load_dataset").noted(dataset.DatasetReport(tmp_path, (), problems))
    assert lines[0] == "warning: 0.png: is small" and len(lines) == 21
    assert lines[-1] == "10 more warnings of the dataset: see Load Dataset"


def test_more_preview_prompts_than_a_sheet_has_room_for(comfyui: ComfyUI) -> None:
    """A JPEG has at most 65,535 columns, and a preview that cannot be written ends ComfyUI's server."""
    texts = comfyui.module("nodes.comfy_host.previews").preview_texts
    assert len(texts("\n".join(map(str, range(32))), [], "")) == 32
    with pytest.raises(ValueError, match="preview_prompts: at most 32 prompts, one per line, there are 33"):
        texts("\n".join(map(str, range(33))), [], "")


class WithEmbeddings:
    """A CLIP of width 8 for which the embeddings `known` are there, by width."""

    def __init__(self, **known: int) -> None:
        weight = torch.zeros(5, 8)
        inner = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))
        self.cond_stage_model = SimpleNamespace(clip="qwen", qwen=SimpleNamespace(transformer=inner))
        self.known = known

    def tokenize(self, text: str) -> dict[str, list]:
        name = text.removeprefix("embedding:")
        found = [(torch.zeros(self.known[name]), 1.0)] if name in self.known else []
        return {"qwen": [[(3, 1.0), *found]]}


def test_embeddings_that_comfyui_leaves_out_are_named(comfyui: ComfyUI) -> None:
    notes = comfyui.module("nodes.comfy_host.embeddings").embedding_notes
    texts = [
        ("one", "a dog, embedding:there, asleep"),
        ("two", "embedding:lost dog"),
        ("three", "a embedding:lost dog embedding:wide"),
        ("four", "noembedding:x"),
    ]
    lost, wide = notes(WithEmbeddings(there=8, wide=16), texts)
    assert lost == "warning: two: the embedding lost is not used: there is no such file in models/embeddings"
    assert wide.startswith("warning: three: the embedding wide is not used: it has the width 16, this CLIP 8")


def test_build_teacher_condition_names_an_embedding_that_is_not_there(comfyui: ComfyUI) -> None:
    graph = training("embedded")
    del graph["train"]
    graph["conditions"]["inputs"]["anchor_prompts"] = "a badge embedding:nowhere"
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["conditions", 0]}}
    run = comfyui.execute(graph)
    assert run.status == "success", run.error
    assert once("warning: anchor prompt 1: the embedding nowhere is not used", run.texts("conditions")[-1])


def test_build_teacher_condition_names_encoders_that_are_not_used(comfyui: ComfyUI) -> None:
    conditions, teachers = comfyui.module("nodes.build_teacher_condition"), comfyui.core("conditioning.teachers")
    tokenizer = comfyui.call(towers.clip, "z_image").tokenizer
    clip = SimpleNamespace(use_clip_schedule=False, apply_hooks_to_conds=None, tokenizer=tokenizer)
    assert conditions.unused_encoders(teachers.VLM, clip, object()) == ()
    (note,) = conditions.unused_encoders(teachers.EDIT, clip, object())
    assert note.startswith("vision is not used: the teacher edit ")
    hooked = SimpleNamespace(use_clip_schedule=True, apply_hooks_to_conds=object())
    (note,) = conditions.unused_encoders(teachers.EDIT, hooked, None)
    assert note.startswith("the hooks on the CLIP are not used")
