"""Runs the quickstart workflow in a real ComfyUI server and measures the node's overhead over the core loop.

    python -m benchmarks.comfyui_quickstart        needs what the tests inside ComfyUI need (make comfyui)

Three times the same training, in processes of their own and with the same number of threads:

    server     the shipped quickstart, headless: every node, previews, probes, checkpoints
    comfyui    `dopsd_core.train` on ComfyUI's MODEL, without node, previews and callbacks
    standalone `dopsd_core.train` on diffusers' network

And how long it takes from the queue to the first optimizer step: at the first start, when the same graph is started
again with another seed, and again in a new server, for which the encoded texts and images are on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Section, Table, comfyui_version, measured_here, record

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "comfyui"


def server_run(threads: int) -> dict[str, Any]:
    """Seconds of the whole workflow and of each node, and of boot; the configuration that was trained. CPU seconds and
    preview sheets of the training node."""
    import psutil
    from graphs import node_of, shipped
    from inprocess import new_base
    from live import Server

    base = new_base(Path(tempfile.mkdtemp()))
    server = Server(base, base / "server.log", threads=threads)
    spent: list[float] = []

    def count_cpu(event: Any) -> None:
        if event.kind == "executing":
            times = psutil.Process(server.process.pid).cpu_times()
            spent.append(times.user + times.system)

    try:
        graph = shipped("quickstart")
        began = time.monotonic()
        run = server.run(graph, count_cpu, timeout=1200)
        total = time.monotonic() - began
        if run.status != "success":
            raise RuntimeError(run.error)
        marks = [(event.data["node"], event.at) for event in run.of("executing")]
        nodes: dict[str, float] = {}
        cpu: dict[str, float] = {}
        for number, ((node, at), (_, after)) in enumerate(zip(marks, marks[1:], strict=False)):
            kind = graph[node]["class_type"]
            nodes[kind], cpu[kind] = after - at, spent[number + 1] - spent[number]
        trains = graph[node_of(graph, "DOPSD_TrainLoRA")]["class_type"]
        (folder,) = (server.output / "dopsd").glob("demo_badge-*")
        return {
            "boot": server.boot_seconds,
            "total": total,
            "nodes": nodes,
            "train": nodes[trains],
            "cpu": cpu[trains],
            "sheets": len(list(folder.glob("previews/*.png"))),
            "config": (folder / "config.json").read_text(),
            "steps": [json.loads(line).get("seconds") for line in (folder / "train.jsonl").read_text().splitlines()],
            "rss_mb": server.rss() / 2**20,
        }
    finally:
        server.stop()


def starts(threads: int) -> dict[str, float]:
    """Seconds from queueing the quickstart to its first optimizer step, by which start it is."""
    from graphs import node_of, shipped
    from inprocess import new_base
    from live import Server

    base = new_base(Path(tempfile.mkdtemp()))
    graph = shipped("quickstart")
    trains = node_of(graph, "DOPSD_TrainLoRA")
    found: dict[str, float] = {}
    for number, servers_starts in enumerate((("first start", "again"), ("again, in a new server",))):
        server = Server(base, base / f"server{number}.log", threads=threads)
        try:
            for seed, start in enumerate(servers_starts, 10 * number):
                graph[trains]["inputs"] |= {"seed": seed, "steps": 5, "run_name": f"start{seed}"}
                began = time.monotonic()
                run = server.run(graph, timeout=1200)
                if run.status != "success":
                    raise RuntimeError(run.error)
                found[start] = next(e.at for e in run.of("progress", trains) if e.data["value"] == 1) - began
        finally:
            server.stop()
    return found


def bare_comfyui(config_text: str, threads: int) -> tuple[float, float]:
    """Seconds and CPU seconds of the core loop on ComfyUI's MODEL, called in the executor's thread."""
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

    def loop() -> tuple[float, float]:
        torch.set_num_threads(threads)
        denoiser = comfyui.module("nodes.comfy_host.denoiser").ComfyDenoiser(model)
        with torch.inference_mode(), denoiser.trainable((config.batch_size, 16, 8, 8)):
            began, spent = time.perf_counter(), time.process_time()
            comfyui.core("training.trainer").train(config, denoiser, conditions.data, tempfile.mkdtemp())
            return time.perf_counter() - began, time.process_time() - spent

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


def section(threads: int) -> Section:
    """Seconds of the three runs, and what the node costs over the bare loop."""
    server = apart("server", threads)
    (comfyui, cpu), standalone = (apart(part, threads, server["config"]) for part in ("comfyui", "standalone"))
    rows = [
        ("quickstart, whole workflow", server["total"]),
        *((f"of it {kind}", seconds) for kind, seconds in server["nodes"].items() if seconds >= 0.3),
        ("`dopsd_core.train` on the same MODEL, without node, previews and callbacks", comfyui),
        ("`dopsd_core.train` without ComfyUI, diffusers' network", standalone),
        ("start of the server", server["boot"]),
        *((f"to the first optimizer step, {start}", seconds) for start, seconds in apart("starts", threads).items()),
    ]
    note = (
        f"{threads} threads, one run each. The training node adds {server['train'] / comfyui - 1:.1%} to the bare loop "
        f"on the same MODEL. In CPU seconds these are {server['cpu']:.1f} and {cpu:.1f}; the node also draws "
        f"{server['sheets']} preview sheets. How much of their time the threads wait for each other between the small "
        "operations of this network, asleep or spinning, is OpenMP's matter and another on every machine. "
        f"The server holds {server['rss_mb'] / 1000:.1f} GB afterwards."
    )
    table = Table(("what", "seconds"), tuple((name, f"{seconds:.1f}") for name, seconds in rows))
    title = "The quickstart in a ComfyUI server"
    return Section("quickstart", title, "python -m benchmarks.comfyui_quickstart", None, table, (note,))


def main() -> None:
    """Measures all parts, each in a process of its own, and records them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", choices=("server", "starts", "comfyui", "standalone"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is None:
        found = measured_here(section(args.threads), comfyui_version())
        record(found, RESULTS)
        print(found.to_markdown())
        return
    if args.part != "standalone":
        sys.path.insert(0, str(TESTS))
    parts = {"server": server_run, "starts": starts, "comfyui": bare_comfyui, "standalone": bare_standalone}
    takes_config = args.part in ("comfyui", "standalone")
    result = parts[args.part](*([sys.stdin.read()] if takes_config else []), args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
