"""The kinds of input that only ComfyUI can read: workflows in API form, and files of the teacher's vision tower.

Import in a process of its own: ComfyUI takes over `sys.path`, and this checkout's `nodes` is then ComfyUI's.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import json
import logging
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.reliability_inputs import Broken, Kind, Refused, as_json, on_file
from benchmarks.reliability_mutators import Chance, mutate_bytes, mutate_json, mutate_safetensors
from benchmarks.reliability_seeds import images
from benchmarks.reliability_trees import Tree, snapshot
from benchmarks.report import ROOT

TESTS = ROOT / "tests" / "comfyui"
DATA = "fuzz"
"""Name of the dataset in ComfyUI's input folder."""

EXECUTED = 0.05
"""Share of the accepted workflows that are run as well, with a training of one step."""

DOCUMENTED = (
    "ValueError", "InputError", "LeftOutError", "ConfigError", "DatasetError", "ImageError", "NonFiniteError",
    "StateError", "OutOfMemory",
)  # fmt: skip
LIMITS = {"steps": 1, "rank": 4, "batch_size": 2, "grad_accumulation": 1, "preview_every": 0, "resolution": 64}
"""What a run may ask for at most: fuzzed numbers would train for days."""


@cache
def comfyui() -> Any:
    """ComfyUI in this process, over a new base folder with a dataset in it."""
    sys.path.insert(0, str(TESTS))
    import inprocess

    if reason := inprocess.why_not():
        raise RuntimeError(reason)
    inprocess.put_first_on_path()
    sys.path.insert(1, str(TESTS))
    base = inprocess.new_base(Path(tempfile.mkdtemp(prefix="dopsd-fuzz-")))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    found = inprocess.ComfyUI(base)
    logging.getLogger().setLevel(logging.CRITICAL)
    folder = found.input / DATA
    folder.mkdir()
    (folder / "a.png").write_bytes(images()["rgb.png"])
    (folder / "a.txt").write_text("a [V] badge, left", encoding="utf-8")
    return found


# -- workflows ---------------------------------------------------------------------------------------------------------


def make_workflow(chance: Chance) -> Tree:
    """A shipped workflow in API form, or the short training of the tests."""
    names = sorted((ROOT / "workflows" / "api").glob("*.json"))
    if chance.random() < 0.5:
        comfyui()
        from graphs import training

        graph = training("fuzz", **{name: value for name, value in LIMITS.items() if name != "resolution"})
        graph["data"]["inputs"]["folder"] = DATA
        return Tree({b"graph.json": json.dumps(graph).encode()})
    return Tree({b"graph.json": chance.choice(names).read_bytes()})


def change_node(tree: Tree, chance: Chance) -> None:
    """One node of a workflow: an input, its kind, or all of it; the rest stays good JSON."""
    try:
        graph = json.loads(tree.files[b"graph.json"])
        node = graph[chance.choice(sorted(graph))]
        part = node["inputs"] if chance.random() < 0.9 else node
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    mutate_json(part, chance)
    tree.files[b"graph.json"] = json.dumps(graph).encode()


def read_workflow(folder: Path, chance: Chance) -> None:
    """What ComfyUI does with a workflow that is posted to it: validates it, and runs it now and then."""
    host = comfyui()
    try:
        graph = json.loads((folder / "graph.json").read_bytes())
    except (ValueError, RecursionError):
        raise Refused("no JSON") from None
    if not isinstance(graph, dict) or not all(isinstance(node, dict) for node in graph.values()):
        raise Refused("no workflow")
    before = snapshot(host.input)
    valid = host.call(_validate, host, json.loads(json.dumps(graph)))
    if valid and _is_demo(graph) and chance.random() < EXECUTED:
        _execute(host, graph)
    if snapshot(host.input) != before:
        raise Broken("the input folder has changed")
    if not valid:
        raise Refused("refused by validation")


def _validate(host: Any, graph: dict[str, Any]) -> bool:
    """Whether ComfyUI would take the workflow whole.

    Raises:
        Broken: a function of the pack raised where it should have answered.
    """
    try:
        valid, _, _, found = asyncio.run(host.execution.validate_prompt(str(uuid.uuid4()), graph, None))
    except Exception as error:
        if _is_ours(_frames(error)):
            raise
        return False  # ComfyUI's own validation expects the shape of a workflow
    for node in found.values():
        for complaint in node["errors"]:
            trace = complaint.get("extra_info", {}).get("traceback", [])
            if _is_ours(_files("".join(trace))):
                raise Broken(f"{node['class_type']} raised in validation: {complaint['details']}\n{trace[-1]}")
    return valid and not found


def _execute(host: Any, graph: dict[str, Any]) -> None:
    for node in graph.values():
        declared = host.pack_nodes[node["class_type"]].define_schema().inputs
        for name in LIMITS.keys() & {one.id for one in declared}:  # what is missing takes its default, which is large
            if not isinstance(node["inputs"].get(name), list):
                node["inputs"][name] = LIMITS[name]
    run = host.execute(graph)
    if run.status != "error":
        return
    message = run.message("execution_error")
    files = _files("".join(message["traceback"]))
    name = message["exception_type"].rpartition(".")[2]
    if _is_ours(files) and (name not in DOCUMENTED or not _is_ours(files[-1:]) or not message["exception_message"]):
        trace = "".join(message["traceback"])
        raise Broken(f"{message['node_type']}: undocumented {name}: {message['exception_message']}\n{trace}")


def _is_demo(graph: Mapping[str, Any]) -> bool:
    kinds = {str(node.get("class_type")) for node in graph.values()}
    plain = all(isinstance(node.get("inputs"), dict) for node in graph.values())
    return plain and "DOPSD_LoadDemoModels" in kinds and all(kind.startswith("DOPSD_") for kind in kinds)


def _files(trace: str) -> list[str]:
    return re.findall(r'File "([^"]+)"', trace)


def _frames(error: BaseException) -> list[str]:
    found, frame = [], error.__traceback__
    while frame is not None:
        found.append(frame.tb_frame.f_code.co_filename)
        frame = frame.tb_next
    return found


def _is_ours(files: list[str]) -> bool:
    return any("ComfyUI-DOPSD" in file for file in files)


# -- vision files ------------------------------------------------------------------------------------------------------


@cache
def _tower() -> tuple[Any, dict[str, bytes]]:
    """A small tower's specification, and its file in one piece, in several, and quantised."""
    host = comfyui()
    import towers

    spec = towers.tiny(host.module("nodes.comfy_host.vision"))
    spec = dataclasses.replace(spec, tower={**spec.tower, "depth": 3})
    _, state = towers.reference(spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        towers.in_a_file(folder / "one.safetensors", state)
        towers.in_several(folder, state)
        return spec, {path.name: path.read_bytes() for path in folder.iterdir()}


def make_vision(chance: Chance) -> Tree:
    """The tower's file, or its three files with their index."""
    files = _tower()[1]
    one = {name: data for name, data in files.items() if name.startswith("one")}
    several = {name: data for name, data in files.items() if not name.startswith("one")}
    return Tree({name.encode(): data for name, data in chance.choice((one, several)).items()})


def read_vision(folder: Path, _: Chance) -> None:
    """The tower from whichever file there is."""
    load = comfyui().module("nodes.comfy_host.vision_file").load_teacher_vision
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise Refused("no file")
    load(paths[0], _tower()[0])


COMFYUI_KINDS = (
    Kind(
        "workflows",
        3_000,
        make_workflow,
        [*[change_node] * 8, on_file(as_json, ".json"), on_file(mutate_bytes, ".json")],
        read_workflow,
        (),
        hang_seconds=60,
    ),
    Kind(
        "vision files",
        1_000,
        make_vision,
        [on_file(mutate_safetensors, ".safetensors"), on_file(mutate_bytes, ".safetensors"), on_file(as_json, ".json")],
        read_vision,
        (ValueError,),
    ),
)
