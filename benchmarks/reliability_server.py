"""The measured ComfyUI server: a real one with the pack and a probe, and the readings of its runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

TESTS = ROOT / "tests" / "comfyui"
PROBE = "dopsd_probe"

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # the client and the graphs of the tests inside ComfyUI

from graphs import drawing, training  # noqa: E402
from inprocess import new_base, why_not  # noqa: E402
from live import Server  # noqa: E402
from runs import Run  # noqa: E402

__all__ = ["Run", "Server", "booted", "new_home", "training", "why_not"]

QUICK: dict[str, Any] = {
    "rank": 4, "batch_size": 2, "rollout_steps": 2, "checkpoint_every": 2, "preview_every": 2, "probe_every": 2,
    "warmup": 1, "steps": 6,
}  # fmt: skip
"""Settings of a training of seconds with everything in it: previews, probes, checkpoints."""

MOMENTS = (
    "encoding", "before step 1", "within a step", "in a preview", "in a preview's save", "in a checkpoint's save",
    "in the LoRA's save",
)  # fmt: skip
"""Those that the probe knows."""

PROMPT = "a [V] badge, left, on a white background"


def new_home(folder: Path) -> Path:
    """A base folder of ComfyUI's with the pack and the probe."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = new_base(folder)
    probe = base / "custom_nodes" / PROBE
    probe.mkdir()
    shutil.copyfile(ROOT / "benchmarks" / "reliability_probe.py", probe / "__init__.py")
    shutil.copyfile(ROOT / "benchmarks" / "reliability_audit.py", probe / "prestartup_script.py")
    return base


@contextmanager
def booted(base: Path, *flags: str) -> Iterator[Server]:
    """A server over a base folder, stopped after the `with`; its log is beside the folder."""
    if reason := why_not():
        raise RuntimeError(reason)
    server = Server(base, base.with_suffix(".log"), flags)
    try:
        yield server
    finally:
        server.stop()


def arm(server: Server, moment: str, number: int, action: str) -> None:
    """Has the server do something at the n-th time of a moment of what runs next."""
    inputs = {"moment": moment, "number": number, "action": action}
    run = server.run({"at": {"class_type": "Probe_At", "inputs": inputs}})
    if run.status != "success":
        raise RuntimeError(f"the probe could not be armed: {run.error}")


def state(server: Server) -> dict[str, Any]:
    """What the server holds now, see reliability_probe.state_of; of the demo model's MODEL, CLIP and VAE."""
    inputs = {"model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2]}
    graph = {"models": training()["models"], "probe": {"class_type": "Probe_State", "inputs": inputs}}
    run = server.run(graph)
    if run.status != "success":
        raise RuntimeError(f"the probe failed: {run.error}")
    return json.loads(run.outputs["probe"]["text"][0])


def drawn(server: Server, shift: float) -> bytes:
    """The pixels of one and the same image of the untouched MODEL; another `shift` near 0 computes them anew."""
    graph = {"models": training()["models"], **drawing(PROMPT, model=("shifted", 0))}
    inputs = {"model": ["models", 0], "shift": 3.0 + shift}
    graph["shifted"] = {"class_type": "ModelSamplingAuraFlow", "inputs": inputs}
    run = server.run(graph)
    if run.status != "success":
        raise RuntimeError(f"the untouched model could not draw: {run.error}")
    (image,) = run.outputs["show"]["images"]
    return pixels(server, image)


def pixels(server: Server, image: dict[str, str]) -> bytes:
    """Of an image that a node shows; the file itself holds the graph too."""
    import io

    from PIL import Image

    place = f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
    return Image.open(io.BytesIO(server.get_bytes(place))).convert("RGB").tobytes()


def run_folder(server: Server, name: str) -> Path:
    """The one folder of the runs of a name."""
    (folder,) = (server.output / "dopsd").glob(f"{name}-*")
    return folder


def result_of(folder: Path) -> dict[str, bytes]:
    """What a finished run has: LoRA, and its newest checkpoint's tensors; without headers and wall times."""
    newest = max((folder / "checkpoints").glob("step-*"))
    files = {f"{newest.name}/{path.name}": tensor_bytes(path) for path in newest.glob("*.safetensors")}
    return files | {"lora": tensor_bytes(folder / "lora.safetensors")}


def tensor_bytes(path: Path) -> bytes:
    """A safetensors file without its header, but with its names and places."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}
    return json.dumps(header, sort_keys=True).encode() + data[end:]
