"""API graphs of the demo model, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inprocess import ROOT

SHORT: dict[str, Any] = {
    "steps": 6,
    "rank": 4,
    "preview_every": 3,
    "checkpoint_every": 100,
    "probe_every": 3,
    "warmup": 1,
}
"""Settings of a run of seconds."""


WORKFLOWS = ROOT / "workflows"
LEGACY = ROOT / "tests" / "legacy" / "workflows"
"""The workflows of release 0.2, as users have saved them: both forms, laid out as `WORKFLOWS` is."""


def shipped(name: str, workflows: Path = WORKFLOWS) -> dict:
    """The API form of a shipped workflow, or of one in another folder."""
    return json.loads((workflows / "api" / f"{name}.json").read_text(encoding="utf-8"))


def shrunk(graph: dict, **settings: Any) -> dict:
    """The graph on few images of 64 pixels and with a short training; loaders, file names and wiring stay.

    settings: of Train LoRA, over `SHORT`.
    """
    graph = json.loads(json.dumps(graph))
    small = {"width": 64, "height": 64, "resolution": 64, "megapixels": 0.01, "pictures": 1}
    short = {**{key: SHORT[key] for key in ("steps", "rank", "preview_every", "probe_every")}, **settings}
    for node in graph.values():
        inputs, trains = node["inputs"], node["class_type"] == "DOPSD_TrainLoRA"
        for name, value in {**small, **(short if trains else {})}.items():
            if name in inputs and not isinstance(inputs[name], list):
                inputs[name] = value
        for name in {"prompts", "preview_prompts"} & inputs.keys():
            inputs[name] = inputs[name].partition("\n")[0]
    return graph


def node_of(graph: dict, kind: str) -> str:
    """The id of the graph's one node of that class."""
    (found,) = [key for key, node in graph.items() if node["class_type"] == kind]
    return found


def training(run_name: str = "test", **settings: Any) -> dict:
    """Demo model and dataset, dual conditions, a short training. Nodes "models", "data", "conditions", "train"."""
    whole = shipped("quickstart")
    ids = {
        "models": "DOPSD_LoadDemoModels",
        "data": "DOPSD_LoadDataset",
        "conditions": "DOPSD_BuildTeacherCondition",
        "train": "DOPSD_TrainLoRA",
    }
    new = {node_of(whole, kind): name for name, kind in ids.items()}

    def renamed(value: Any) -> Any:
        return [new[value[0]], value[1]] if isinstance(value, list) else value

    graph = {}
    for old, name in new.items():
        inputs = {key: renamed(value) for key, value in whole[old]["inputs"].items()}
        graph[name] = {"class_type": ids[name], "inputs": inputs}
    graph["train"]["inputs"].update({**SHORT, "run_name": run_name, **settings})
    return graph


def drawing(prompt: str, seed: int = 0, model: tuple[str, int] = ("models", 0)) -> dict:
    """Nodes "text", "sample", "decode", "show" that draw a prompt with the model of `training`'s graph."""
    return {
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["models", 1], "text": prompt}},
        "sample": {
            "class_type": "DOPSD_FewStepSampler",
            "inputs": {
                "model": list(model),
                "positive": ["text", 0],
                "seed": seed,
                "steps": 0,
                "width": 64,
                "height": 64,
                "batch_size": 1,
                "sampler": "euler",
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["models", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }
