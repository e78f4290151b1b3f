"""What a script sends is taken as it stands, or refused; ComfyUI alone converts 2.9 steps to 2 and null to a word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from graphs import drawing, training
from inprocess import ComfyUI
from live import Server


def graph(name: str, node: str, **inputs: Any) -> dict:
    made = training(name, steps=1, preview_every=0, probe_every=0)
    made[node]["inputs"].update(inputs)
    return made


UNREAD = "colour is not used: there is no such input"

REFUSED: dict[str, tuple[str, str, Any, str]] = {
    # node, input, value, what is said
    "a part of a step": ("train", "steps", 2.9, "whole number"),
    "true for one step": ("train", "steps", True, "whole number"),
    "digits with an underscore": ("train", "steps", "1_0", "'1_0' is not a whole number"),
    "no finite number": ("train", "steps", float("inf"), "whole number"),
    "a part of a seed": ("train", "seed", 1.5, "whole number"),
    "true for a rate": ("data", "caption_dropout", True, "it must be a number"),
    "a rate with an underscore": ("train", "learning_rate", "1_0e-5", "'1_0e-5' is not a number"),
    "a rate that is none": ("train", "learning_rate", "nan", "'nan' is not a number"),
    "false for text": ("conditions", "teacher_sentence", False, "it must be text"),
    "an object for text": ("data", "trigger", {"a": 1}, "it must be text"),
    "a wrapped object for text": ("data", "trigger", {"__value__": {"a": 1}}, "it must be text"),
    "a word for yes or no": ("train", "deterministic", "no", "true or false"),
    "a number for yes or no": ("train", "deterministic", 1, "true or false"),
    "a misspelt input": ("train", "lerning_rate", 0.1, "there is no input lerning_rate; did you mean learning_rate?"),
    "a misspelt link": ("train", "setings", ["models", 0], "there is no input setings; did you mean settings?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_its_name(server: Server, case: str) -> None:
    node, name, value, sentence = REFUSED[case]
    status, answer = server.send("/prompt", {"prompt": graph("sent", node, **{name: value})})
    assert status == 400 and "prompt_id" not in answer
    errors = answer["node_errors"][node]["errors"]
    found = [(error["extra_info"].get("input_name"), f"{error['message']}: {error['details']}") for error in errors]
    assert any(reported and name in said and sentence in said for reported, said in found), found


def test_what_fits_is_taken(comfyui: ComfyUI) -> None:
    """Whole numbers as floats or text, numbers as text, null for an optional input."""
    sent = comfyui.module("nodes.comfy_host.sent_values")
    made = graph("sent", "train", steps=3.0, rank="4", learning_rate="1e-3", deterministic="False", preset="standard")
    made["data"]["inputs"] |= {"trigger": None, "repeats": "2"}
    made["other"] = {"class_type": "PreviewImage", "inputs": {"images": None, "x": 1}}
    found = sent.checked_graph(made)
    values = found["train"]["inputs"]
    taken = [values[name] for name in ("steps", "rank", "learning_rate", "deterministic", "preset", "model")]
    assert taken == [3, 4, 1e-3, False, "standard", ["models", 0]]
    assert [type(value) for value in taken[:4]] == [int, int, float, bool]
    assert "trigger" not in found["data"]["inputs"] and found["data"]["inputs"]["repeats"] == 2
    assert found["other"] == made["other"]


def test_null_is_as_if_it_were_not_given(server: Server) -> None:
    """Not the trigger None, in place of [V]."""
    with_null, without = graph("null", "data", trigger=None), graph("null", "data")
    del without["data"]["inputs"]["trigger"]
    for made in (with_null, without):
        run = server.run(made)
        assert run.status == "success", run.error
    assert len(list((server.output / "dopsd").glob("null-*"))) == 1


def test_an_input_that_is_none_of_ours_is_named(server: Server) -> None:
    run = server.run(graph("stranger", "train", colour="blue"))
    assert run.status == "success", run.error
    assert run.texts("train")[-1].split("\n").count(UNREAD) == 1


def test_every_node_names_what_it_has_no_input_for(comfyui: ComfyUI) -> None:
    """Also those that show no text otherwise; the training node and its report repeat it for all that come before."""
    made = graph("strangers", "train", settings=["settings", 0])
    made["settings"] = {"class_type": "DOPSD_TrainingSettings", "inputs": {"preset": "demo model"}}
    made["look"] = {
        "class_type": "DOPSD_TeacherPreview",
        "inputs": {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2], "pictures": 1},
    }
    made["save"] = {"class_type": "DOPSD_SaveLoRA", "inputs": {"lora": ["train", 0]}}
    made["compare"] = {
        "class_type": "DOPSD_CompareLoRA",
        "inputs": {
            "model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "prompts": "a badge", "width": 64,
            "height": 64, "lora": ["train", 0],
        },
    }  # fmt: skip
    made |= drawing("a badge")
    ours = [id for id, node in made.items() if node["class_type"].startswith("DOPSD_")]
    for id in ours:
        made[id]["inputs"]["colour"] = ["data", 1] if id == "conditions" else "blue"
    run = comfyui.execute(made)
    assert run.status == "success", run.error
    for id in ours:
        assert run.texts(id)[-1].split("\n").count(UNREAD) == 1, id
    assert all(UNREAD not in text for id in set(made) - set(ours) for text in run.texts(id))
    before = ("Load Demo Models", "Load Dataset (D-OPSD)", "Build Teacher Condition", "Training Settings")
    (folder,) = (comfyui.output / "dopsd").glob("strangers-*")
    notes = json.loads((folder / "report.json").read_text())["notes"]
    assert {note for note in notes if note.endswith(UNREAD)} == {UNREAD, *(f"{title}: {UNREAD}" for title in before)}


def test_every_node_sees_the_graph(comfyui: ComfyUI) -> None:
    from comfy_api.latest import io

    schemas = {name: node.define_schema() for name, node in comfyui.pack_nodes.items()}
    assert [name for name, schema in schemas.items() if io.Hidden.dynprompt not in schema.hidden] == []
    # a loader with unique_id would load its file again for each node
    loads = [name for name in schemas if name in ("DOPSD_LoadDemoModels", "DOPSD_LoadTeacherVision")]
    assert len(loads) == 2 and not any(io.Hidden.unique_id in schemas[name].hidden for name in loads)
