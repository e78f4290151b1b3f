"""comfy-cli drives our server: `comfy run` is the headless way that the README names, so it is kept working here."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from graphs import training
from inprocess import PACK, ROOT, new_base

IMAGE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 0x408020}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "cli"}},
}
SMALL = {"seed": 1, "steps": 0, "width": 64, "height": 64, "batch_size": 1, "sampler": "euler"}


@pytest.fixture
def outside():
    """A proxy that answers nothing and counts who asked: (its address, the callers)."""
    listener, callers = socket.create_server(("127.0.0.1", 0)), []

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                callers.append(connection.recv(200))

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", callers
    listener.close()


@pytest.fixture
def comfy(tmp_path, outside):
    """comfy("run", ...) as a user would type it, with a home of its own; nothing may leave this machine."""
    if importlib.util.find_spec("comfy_cli") is None:
        pytest.skip("COMFY-CLI WAS NOT TESTED: it is not in this Python, run `make comfyui`")
    proxy, callers = outside
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    env |= {"DO_NOT_TRACK": "1", "COMFY_CLI_NO_REMOTE_REFRESH": "1"}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        env[name] = env[name.lower()] = proxy
    env["NO_PROXY"] = env["no_proxy"] = "127.0.0.1"

    def comfy(*arguments: object, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)

    yield comfy
    assert not callers, callers


def saved(folder, graph, name="graph.json"):
    path = folder / name
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def test_runs_an_api_graph(comfy, server, tmp_path):
    done = comfy(
        "run", "--json", "--workflow", saved(tmp_path, IMAGE), "--wait", "--timeout", 60,
        "--where", "local", "--host", "127.0.0.1", "--port", server.port,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    envelope = json.loads(done.stdout.splitlines()[-1])
    assert envelope["ok"] and envelope["data"]["status"] == "completed"
    (image,) = server.history(envelope["data"]["prompt_id"])["outputs"]["2"]["images"]
    assert (server.output / image["filename"]).exists()


def test_says_what_the_server_said(comfy, server, tmp_path):
    bad = {**IMAGE, "1": {"class_type": "EmptyImage", "inputs": {**IMAGE["1"]["inputs"], "width": -5}}}
    done = comfy(
        "run", "--json", "--workflow", saved(tmp_path, bad), "--wait",
        "--where", "local", "--host", "127.0.0.1", "--port", server.port,
    )  # fmt: skip
    assert done.returncode != 0
    assert "width" in done.stdout


UI_IMAGE = {
    "version": 0.4,
    "last_node_id": 2,
    "last_link_id": 1,
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "nodes": [
        {
            "id": 1,
            "type": "EmptyImage",
            "pos": [0, 0],
            "size": [300, 150],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "properties": {},
            "widgets_values": [32, 32, 1, 0],
        },
        {
            "id": 2,
            "type": "SaveImage",
            "pos": [400, 0],
            "size": [300, 150],
            "flags": {},
            "order": 1,
            "mode": 0,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
            "outputs": [],
            "properties": {},
            "widgets_values": ["cli"],
        },
    ],
}


def test_sets_inputs_of_a_saved_workflow(comfy, server, tmp_path):
    """`workflow set-slot` writes the values in, `run` converts the workflow by asking the server about its nodes."""
    where = ("--host", "127.0.0.1", "--port", server.port)
    path = saved(tmp_path, UI_IMAGE)
    done = comfy("--json", "workflow", "set-slot", path, "1.width=48", "2.filename_prefix=cli_set", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    done = comfy("run", "--json", "--workflow", path, "--wait", "--where", "local", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    from PIL import Image

    (image,) = server.output.glob("cli_set*.png")
    assert Image.open(image).size == (48, 32)


@pytest.fixture
def registry_install(comfy, tmp_path):
    """A base directory with the pack as the Comfy Registry would install it: what git has, less .comfyignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("THE REGISTRY'S ARCHIVE WAS NOT TESTED: this is not a git checkout")
    clone, base = tmp_path / "clone", new_base(tmp_path / "base")
    subprocess.run(["git", "-c", "safe.directory=*", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for step in ("validate", "pack"):
        done = comfy("--no-json", "node", step, folder=clone)
        assert done.returncode == 0 and "warning" not in done.stdout.lower(), done.stdout + done.stderr
    (base / "custom_nodes" / PACK).unlink()
    with zipfile.ZipFile(clone / "node.zip") as archive:
        archive.extractall(base / "custom_nodes" / "dopsd")
    return base


@pytest.mark.long
def test_the_registrys_archive_is_whole(registry_install, start_server):
    """Committed files alone, under another folder name: nodes, demo weights, templates and pages are all there."""
    pack = registry_install / "custom_nodes" / "dopsd"
    assert not (pack / "tests").exists()
    server = start_server(registry_install)
    assert server.get("/object_info/DOPSD_TrainLoRA")["DOPSD_TrainLoRA"]["python_module"] == "custom_nodes.dopsd"
    load = {"1": {"class_type": "DOPSD_LoadDemoModels", "inputs": {}}}
    text = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a badge"}}
    sample = {"class_type": "DOPSD_FewStepSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0], **SMALL}}
    decode = {"class_type": "VAEDecode", "inputs": {"vae": ["1", 2], "samples": ["3", 0]}}
    show = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    run = server.run({**load, "2": text, "3": sample, "4": decode, "5": show})
    assert run.status == "success", run.error
    templates = sorted(path.stem for path in (pack / "workflows").glob("*.json"))
    assert templates and templates == sorted(server.get("/workflow_templates").get("dopsd", ()))
    server.stop()


@pytest.mark.long
def test_trains_the_quickstart(comfy, server, tmp_path):
    """The template itself, with fewer steps: a LoRA file is there at the end."""
    where, path = ("--host", "127.0.0.1", "--port", server.port), tmp_path / "mine.json"
    path.write_bytes((ROOT / "workflows" / "quickstart.json").read_bytes())
    train, save = (node_of(path, name) for name in ("DOPSD_TrainLoRA", "DOPSD_SaveLoRA"))
    values = (
        f"{train}.steps=5",
        f"{train}.preview_every=0",
        f"{train}.run_name=cli",
        f"{save}.filename_prefix=loras/cli",
    )
    done = comfy("--json", "workflow", "set-slot", path, *values, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    done = comfy("run", "--json", "--workflow", path, "--wait", "--where", "local", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((server.output / "loras").glob("cli*.safetensors"))


@pytest.mark.parametrize(("inputs", "named"), [({"run_name": "lpt1"}, "run_name"), ({"vae": ["models", 0]}, "vae")])
def test_an_invalid_training_is_no_success(comfy, server, tmp_path, inputs, named):
    """Load Dataset alone could run: ComfyUI would call that a success."""
    graph = training("cli-invalid", steps=1, preview_every=0, probe_every=0)
    graph["train"]["inputs"] |= inputs
    done = comfy(
        "run", "--json", "--workflow", saved(tmp_path, graph), "--wait", "--timeout", 60,
        "--where", "local", "--host", "127.0.0.1", "--port", server.port,
    )  # fmt: skip
    assert done.returncode != 0 and named in done.stdout + done.stderr
    assert not list((server.output / "dopsd").glob("cli-invalid*"))


def test_a_graph_that_lacks_an_input_trains(comfy, server, tmp_path):
    graph = training("cli-lacks", steps=1, preview_every=0, probe_every=0)
    del graph["train"]["inputs"]["memory"]
    done = comfy(
        "run", "--json", "--workflow", saved(tmp_path, graph), "--wait", "--timeout", 200,
        "--where", "local", "--host", "127.0.0.1", "--port", server.port,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((server.output / "dopsd").glob("cli-lacks-*/lora.safetensors"))


def node_of(workflow, kind):
    (node,) = (n["id"] for n in json.loads(workflow.read_text(encoding="utf-8"))["nodes"] if n["type"] == kind)
    return node
