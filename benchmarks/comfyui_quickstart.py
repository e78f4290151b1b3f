"""Runs the quickstart workflow in a real ComfyUI server and measures the node's overhead over the core loop.

    python -m benchmarks.comfyui_quickstart        needs what the tests inside ComfyUI need (make comfyui)

Three times the same training, in processes of their own and with the same number of threads:

    server     the shipped quickstart, headless: every node, previews, probes, checkpoints
    comfyui    `dopsd_core.train` on ComfyUI's MODEL, without node, previews and callbacks
    standalone `dopsd_core.train` on diffusers' network
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "comfyui"


def server_run(threads: int) -> dict[str, Any]:
    """Seconds of the whole workflow and of each node, and of boot; the configuration that was trained."""
    from graphs import node_of, shipped
    from inprocess import new_base
    from live import Server

    base = new_base(Path(tempfile.mkdtemp()))
    server = Server(base, base / "server.log", threads=threads)
    try:
        graph = shipped("quickstart")
        began = time.monotonic()
        run = server.run(graph, timeout=1200)
        total = time.monotonic() - began
        if run.status != "success":
            raise RuntimeError(run.error)
        marks = [(event.data["node"], event.at) for event in run.of("executing")]
        nodes: dict[str, float] = {}
        for (node, at), (_, after) in zip(marks, marks[1:], strict=False):
            nodes[graph[node]["class_type"]] = after - at
        (folder,) = (server.output / "dopsd").iterdir()
        return {
            "boot": server.boot_seconds,
            "total": total,
            "nodes": nodes,
            "train": nodes[graph[node_of(graph, "DOPSD_TrainLoRA")]["class_type"]],
            "config": (folder / "config.json").read_text(),
            "steps": [json.loads(line).get("seconds") for line in (folder / "train.jsonl").read_text().splitlines()],
            "rss_mb": server.rss() / 2**20,
        }
    finally:
        server.stop()


def bare_comfyui(config_text: str, threads: int) -> float:
    """Seconds of the core loop on ComfyUI's MODEL, called in the executor's thread."""
    import torch
    from graphs import shipped, training
    from inprocess import ComfyUI, new_base, put_first_on_path

    put_first_on_path()
    comfyui = ComfyUI(new_base(Path(tempfile.mkdtemp())))
    graph = training()
    graph["conditions"]["inputs"]["preview_prompts"] = shipped("quickstart")["3"]["inputs"]["preview_prompts"]
    del graph["train"]
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["conditions", 0]}}
    run = comfyui.execute(graph)
    model, conditions = run.value("models"), run.value("conditions")
    config = comfyui.core("config").TrainConfig.from_json(config_text)

    def loop() -> float:
        torch.set_num_threads(threads)
        denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
        with torch.inference_mode(), denoiser.trainable((config.batch_size, 16, 8, 8)):
            began = time.perf_counter()
            comfyui.core("training.trainer").train(config, denoiser, conditions.data, tempfile.mkdtemp())
            return time.perf_counter() - began

    return comfyui.call(loop)


def bare_standalone(config_text: str, threads: int) -> float:
    """Seconds of the core loop on the standalone host."""
    import torch

    from dopsd_core.config import TrainConfig
    from dopsd_core.data.dataset import read_dataset
    from dopsd_core.demo.concept import make_concept, write_dataset
    from dopsd_core.standalone.hosts.demo import load_demo_model
    from dopsd_core.training.trainer import train
    from dopsd_core.training.training_set import build_training_set

    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp())
    write_dataset(make_concept(0), folder / "data")
    report = read_dataset(folder / "data", pixel_budget=64 * 64, multiple=16)
    model = load_demo_model()
    unseen = "a [V] badge, left, on a white background"
    data = build_training_set(report.pairs, model.encoder, anchors=True, heldout_caption=unseen)
    began = time.perf_counter()
    train(TrainConfig.from_json(config_text), model.denoiser, data, folder / "run")
    return time.perf_counter() - began


def apart(part: str, threads: int, config: str = "") -> Any:
    """One part in a process of its own, whose last line is its result."""
    command = [sys.executable, "-m", "benchmarks.comfyui_quickstart", "--part", part, "--threads", str(threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, input=config, text=True, capture_output=True, cwd=ROOT, env=env)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(threads: int) -> str:
    """The table for the README."""
    server = apart("server", threads)
    comfyui, standalone = (apart(part, threads, server["config"]) for part in ("comfyui", "standalone"))
    rows = [
        ("quickstart, whole workflow", server["total"]),
        *((f"  {kind}", seconds) for kind, seconds in server["nodes"].items() if seconds >= 0.3),
        ("core loop on ComfyUI's MODEL", comfyui),
        ("core loop on the standalone host", standalone),
        ("server's start", server["boot"]),
    ]
    lines = ["| what | seconds |", "|---|---|", *(f"| {name} | {seconds:.1f} |" for name, seconds in rows)]
    day = datetime.date.today().isoformat()
    lines.append(
        f"\nOverhead of the training node over the bare loop on the same MODEL: {server['train'] / comfyui - 1:.1%}; "
        f"over the standalone host's: {server['train'] / standalone - 1:.1%}. Server's memory afterwards "
        f"{server['rss_mb']:.0f} MB. {platform.machine()}, {threads} threads, {day}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", choices=("server", "comfyui", "standalone"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is None:
        print(report(args.threads))
        return
    if args.part != "standalone":
        sys.path.insert(0, str(TESTS))
    parts = {"server": server_run, "comfyui": bare_comfyui, "standalone": bare_standalone}
    result = parts[args.part](*([] if args.part == "server" else [sys.stdin.read()]), args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
