"""Without the page: a graph in which a node of ours is invalid never ends as a success.

ComfyUI drops invalid output nodes and runs the rest, and Load Dataset is an output node: each graph here has an output
node that is valid, so ComfyUI alone would report success.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import nan
from typing import Any

import pytest
import torch
from graphs import drawing, training
from inprocess import ComfyUI
from live import Server
from runs import Run

PROMPT = "a [V] badge, left, on a navy background"


def whole(run_name: str = "headless", **settings: Any) -> dict:
    """Every kind of node of ours downstream of the data, and an image of the user's own."""
    graph = training(run_name, steps=2, preview_every=0, probe_every=0, **settings)
    graph |= {
        "look": {
            "class_type": "DOPSD_TeacherPreview",
            "inputs": {"model": ["models", 0], "conditions": ["conditions", 0], "vae": ["models", 2], "pictures": 1},
        },
        "save": {"class_type": "DOPSD_SaveLoRA", "inputs": {"lora": ["train", 0], "filename_prefix": "loras/headless"}},
        "compare": {
            "class_type": "DOPSD_CompareLoRA",
            "inputs": {
                "model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "prompts": PROMPT, "width": 64,
                "height": 64, "lora": ["train", 0],
            },
        },
    }  # fmt: skip
    return graph | drawing(PROMPT)


def change(node: str, **inputs: Any) -> Callable[[dict], Any]:
    return lambda graph: graph[node]["inputs"].update(inputs)


def without(node: str, name: str) -> Callable[[dict], Any]:
    return lambda graph: graph[node]["inputs"].pop(name)


def with_a_missing_file(graph: dict) -> None:
    graph["file"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "nowhere.sft", "weight_dtype": "default"}}
    graph["train"]["inputs"]["model"] = ["file", 0]


# what is wrong: (how, the node and the input that are named)
WRONG: dict[str, tuple[Callable[[dict], Any], str, str]] = {
    "a name that Windows forbids": (change("train", run_name="aux"), "train", "run_name"),
    "a name with half a character": (change("train", run_name="x\ud83d"), "train", "run_name"),
    "a seed above": (change("train", seed=2**64 + 5), "train", "seed"),
    "a seed below": (change("train", seed=-3), "train", "seed"),
    "no number": (change("train", steps="many"), "train", "steps"),
    "a list for a name": (change("train", run_name=["a", "b", "c"]), "train", "run_name"),
    "no such choice": (change("train", memory="48 GB"), "train", "memory"),
    "no model": (without("train", "model"), "train", "model"),
    "another socket": (change("train", vae=["models", 1]), "train", "vae"),
    "a loader's file": (with_a_missing_file, "file", "unet_name"),
    "no CLIP": (without("conditions", "clip"), "conditions", "clip"),
    "no such mode": (change("conditions", mode="unknown"), "conditions", "mode"),
    "too many images": (change("look", pictures=17), "look", "pictures"),
    "no such dtype": (change("save", dtype="fp4"), "save", "dtype"),
    "a file outside": (change("save", filename_prefix="../x"), "save", "filename_prefix"),
    "no LoRA to save": (without("save", "lora"), "save", "lora"),
    "strengths in words": (change("compare", strengths="strong"), "compare", "strengths"),
    "no prompts to compare": (change("compare", prompts="\n"), "compare", "prompts"),
    "too high": (change("sample", height=10_000), "sample", "height"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_server_refuses_the_whole_graph(server: Server, case: str) -> None:
    make, node, name = WRONG[case]
    graph = whole()
    make(graph)
    status, answer = server.send("/prompt", {"prompt": graph})
    assert status == 400 and "prompt_id" not in answer
    assert name in [error["extra_info"]["input_name"] for error in answer["node_errors"][node]["errors"]]
    assert not list((server.output / "dopsd").glob("headless-*"))


def test_a_link_to_nowhere_is_refused(server: Server) -> None:
    graph = whole()
    graph["train"]["inputs"]["conditions"] = ["nowhere", 0]
    status, answer = server.send("/prompt", {"prompt": graph})
    assert status == 400 and "nowhere" in json.dumps(answer["node_errors"])


def test_what_nobody_asks_for_may_be_invalid(server: Server) -> None:
    """The page's "run this node": the dataset can be looked at before the rest is wired."""
    graph = whole()
    change("train", run_name="aux")(graph)
    run = server.run(graph, partial_execution_targets=["data"])
    assert run.status == "success" and list(run.outputs) == ["data"]
    refused = server.run(graph, partial_execution_targets=["data", "save"])
    assert refused.status == "refused" and "train" in refused.refusal["node_errors"]


def test_what_other_packs_make_of_a_graph_counts(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their handlers may be registered after ours, and mend what the client sent."""
    monkeypatch.setattr(comfyui.server, "on_prompt_handlers", [])
    comfyui.module("nodes.comfy_host.whole_graph").register()

    def mend(request: dict) -> dict:
        request["prompt"]["train"]["inputs"]["run_name"] = "mended"
        return request

    graph = whole()
    change("train", run_name="aux")(graph)
    refused = comfyui.call(comfyui.server.trigger_on_prompt, {"prompt": graph})
    assert set(refused["partial_execution_targets"]) == {"train", "save", "compare"}
    monkeypatch.setattr(comfyui.server, "on_prompt_handlers", [])
    comfyui.module("nodes.comfy_host.whole_graph").register()
    comfyui.server.add_on_prompt_handler(mend)
    for _ in range(2):
        change("train", run_name="aux")(graph)
        assert "partial_execution_targets" not in comfyui.call(comfyui.server.trigger_on_prompt, {"prompt": graph})


def test_other_nodes_are_comfyuis_business(comfyui: ComfyUI) -> None:
    """An invalid node after ours, without which all of ours still run; and a graph without ours."""
    find = comfyui.module("nodes.comfy_host.whole_graph").find_left_out
    graph = whole()
    graph["keep"] = {"class_type": "SaveImage", "inputs": {"images": ["train", 3]}}
    assert find(graph) is None
    del graph["save"], graph["compare"], graph["look"]
    graph["train"]["class_type"] = "KSampler"
    foreign = {node: value for node, value in graph.items() if not value["class_type"].startswith("DOPSD_")}
    assert find(foreign) is None


def test_a_graph_from_before_an_input_existed_trains(server: Server) -> None:
    """Nothing but links and what makes the run short: everything else takes its default."""
    graph = training("defaults", steps=1, preset="demo model", rank=2)
    kept = {"steps", "preset", "rank", "run_name"}
    for node in ("conditions", "train"):
        inputs = graph[node]["inputs"]
        graph[node]["inputs"] = {key: v for key, v in inputs.items() if isinstance(v, list) or key in kept}
    graph["data"]["inputs"] = {"folder": graph["data"]["inputs"]["folder"], "resolution": 64}
    graph["save"] = {"class_type": "DOPSD_SaveLoRA", "inputs": {"lora": ["train", 0]}}
    run = server.run(graph)
    assert run.status == "success", run.error
    assert list((server.output / "loras").glob("dopsd_*.safetensors"))
    (folder,) = (server.output / "dopsd").glob("defaults-*")
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["rollout_steps"]) == (0, 2)
    assert (config["teacher"]["name"], config["objective"]["loss"]) == ("ema", "x0")


# -- an executor without ComfyUI's server ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRONG)
def test_the_first_of_our_nodes_raises(comfyui: ComfyUI, case: str) -> None:
    make, node, name = WRONG[case]
    graph = whole("guarded")
    make(graph)
    titles = comfyui.nodes.NODE_DISPLAY_NAME_MAPPINGS
    title = titles.get(graph[node]["class_type"], graph[node]["class_type"])
    run = comfyui.execute(graph)
    assert run.status == "error"
    assert f"{title} (node {node}): {name}" in run.error and "would leave" in run.error and "\n" not in run.error
    assert not list((comfyui.output / "dopsd").glob("guarded-*"))


@pytest.mark.parametrize(
    ("name", "kind", "value", "sentence"),
    [
        ("steps", "PrimitiveInt", -4, "steps is -4; it must be within 0 and 100000"),
        ("seed", "PrimitiveInt", -1, "seed is -1; it must be within 0 and 18446744073709551615"),
        ("learning_rate", "PrimitiveFloat", 3.0, "learning_rate is 3.0; it must be within 0 and 0.1"),
        ("run_name", "PrimitiveString", "nul", "the run name may not be 'nul': Windows reserves that name"),
    ],
)
def test_what_comes_over_a_link_is_checked_when_it_comes(
    comfyui: ComfyUI, name: str, kind: str, value: Any, sentence: str
) -> None:
    graph = training("linked", preview_every=0, probe_every=0)
    graph["value"] = {"class_type": kind, "inputs": {"value": value}}
    graph["train"]["inputs"][name] = ["value", 0]
    run: Run = comfyui.execute(graph)
    assert run.status == "error" and sentence in run.error and run.error.startswith("D-OPSD Train LoRA: ")
    assert run.message("execution_error")["node_id"] == "train"


def test_every_wrong_input_is_named_at_once(comfyui: ComfyUI) -> None:
    inputs = comfyui.module("nodes.comfy_host.checked_inputs")
    node = comfyui.pack_nodes["DOPSD_TrainLoRA"]
    with pytest.raises(inputs.InputError) as caught:
        inputs.completed(node, {"steps": 1.5, "seed": True, "alpha": nan, "targets": 3, "loss": "l1"})
    for sentence in (
        "steps is 1.5; it must be a whole number",
        "seed is True; it must be a whole number",
        "alpha is nan; it must be a number",
        "targets is 3; it must be text",
        "loss is 'l1'; choose one of x0, velocity",
    ):
        assert sentence in str(caught.value)


def test_what_stands_where_a_link_belongs_is_named(comfyui: ComfyUI) -> None:
    """ComfyUI lets a constant pass for a socket, such as a link that was quoted by mistake."""
    graph = training("quoted", preview_every=0, probe_every=0)
    graph["conditions"]["inputs"]["dataset"] = '["data", 0]'
    run: Run = comfyui.execute(graph)
    sentence = "dataset is '[\"data\", 0]'; connect it to a node that gives DOPSD_DATASET"
    assert run.status == "error" and run.error == f"Build Teacher Condition: {sentence}"
    inputs, schemas = comfyui.module("nodes.comfy_host.checked_inputs"), comfyui.pack_nodes
    for value in (None, 3, True, "x", [], [["x"]], {}, {"a": [1, None]}):
        for name, node in (("conditions", "DOPSD_TeacherPreview"), ("model", "DOPSD_TrainLoRA")):
            with pytest.raises(inputs.InputError, match=f"{name} is .*; connect it to a node that gives"):
                inputs.completed(schemas[node], {name: value})
    for value in ([[torch.zeros(1), {}]], {"a": torch.zeros(1)}, object()):
        with pytest.raises(inputs.InputError, match="conditions is connected to a .*; connect it to a node that gives"):
            inputs.completed(schemas["DOPSD_TeacherPreview"], {"conditions": value})
    assert inputs.completed(schemas["DOPSD_TrainLoRA"], {"vae": None})["vae"] is None  # it is optional
