"""Runs the shipped workflows of Z-Image-Turbo in a real ComfyUI server on files of real size with random weights.

    python -m benchmarks.real_workflow --models /dev/shm/models     26 GB of files, which stay; a GPU of 24 GB or more
    python -m benchmarks.real_workflow --models /dev/shm/models --memory auto --free 17.2    as on a card of 16 GiB

Everything that a user's first training goes through but the values of the weights: ComfyUI's loader nodes, text encoder
and vision encoder, VAE, the training with its previews in every `--memory` asked for, the saved LoRA, and an image with
it in the few steps. Prints seconds per node, per optimizer step, and the most that the server held on the GPU.
Needs what the tests inside ComfyUI need (make comfyui).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import networks, real_files
from benchmarks.real_size import say
from dopsd_core.number_text import float_argument

TESTS = networks.ROOT / "tests" / "comfyui"
CAPTIONS = ("a photo of [V] on a table", "a photo of [V] in the snow", "[V] in a garden", "a drawing of [V]")


@dataclass
class Watched:
    """What the GPU held, in bytes, at most since `restart`.

    Attributes:
        peak: of the process if the driver tells, else of all of them less what was there before.
    """

    peak: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def restart(self) -> None:
        """Forgets what was."""
        self.peak = 0


@contextmanager
def watched(process: int) -> Iterator[Watched]:
    """Asks the driver every 20 ms what the process holds on the first GPU."""
    import pynvml

    pynvml.nvmlInit()
    card, found = pynvml.nvmlDeviceGetHandleByIndex(0), Watched()
    before = pynvml.nvmlDeviceGetMemoryInfo(card).used

    def look() -> None:
        while not found._done.wait(0.02):
            held = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card) if p.pid == process]
            own = held[0].usedGpuMemory if held else None
            found.peak = max(found.peak, own or pynvml.nvmlDeviceGetMemoryInfo(card).used - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found._done.set()
        thread.join()


def write_concept(folder: Path, side: int) -> None:
    """Images of that size with captions."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(CAPTIONS):
        pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(number)).mul(255).byte()
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


def run(server: Any, graph: dict[str, Any], seen: Watched, timeout: float) -> tuple[Any, dict[str, float]]:
    """The finished run of a graph, and the seconds of each node by its class.

    Raises:
        RuntimeError: it did not succeed.
    """
    seen.restart()
    done = server.run(graph, timeout=timeout)
    if done.status != "success":
        raise RuntimeError(f"{done.error or done.refusal}\n{server.log_tail()}")
    marks = [(event.data["node"], event.at) for event in done.of("executing")]
    spent = {graph[node]["class_type"]: after - at for (node, at), (_, after) in zip(marks, marks[1:], strict=False)}
    return done, spent


def trained(server: Any, seen: Watched, memory: str, args: argparse.Namespace) -> None:
    """Trains with this `memory` and prints what it took."""
    from graphs import node_of, shipped

    graph = shipped("z_image_turbo_train")
    graph[node_of(graph, "DOPSD_LoadDataset")]["inputs"]["resolution"] = args.side
    name = f"memory {memory}".replace(" ", "_")
    graph[node_of(graph, "DOPSD_TrainLoRA")]["inputs"] |= {
        "run_name": name, "steps": args.steps, "memory": memory, "preview_every": args.steps, "rank": args.rank,
        "checkpoint_every": args.steps, "probe_every": args.steps,
    }  # fmt: skip
    _, spent = run(server, graph, seen, args.timeout)
    (folder,) = (server.output / "dopsd").glob(f"{name}-*")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    step = statistics.median([row["seconds"] for row in rows if row.get("seconds") is not None][1:])
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    say(f"| train, memory {memory} | {sum(spent.values()):.1f} | {step:.2f} | {seen.peak / 1e9:.2f} | ")
    say("; ".join(f"{kind} {seconds:.1f}" for kind, seconds in spent.items() if seconds >= 0.3))
    say(f"; loss {losses[0]:.3g} to {losses[-1]:.3g} |\n")


def sampled(server: Any, seen: Watched, args: argparse.Namespace) -> None:
    """Draws an image with the LoRA and prints what it took."""
    from graphs import node_of, shipped

    graph = shipped("z_image_turbo_sample")
    (lora,) = sorted((server.output / "loras").glob("*.safetensors"))[-1:]
    graph[node_of(graph, "LoraLoaderModelOnly")]["inputs"]["lora_name"] = lora.name
    done, spent = run(server, graph, seen, args.timeout)
    shown = [image["filename"] for output in done.outputs.values() for image in output.get("images", [])]
    say(f"| sample | {sum(spent.values()):.1f} | | {seen.peak / 1e9:.2f} | ")
    say("; ".join(f"{kind} {seconds:.1f}" for kind, seconds in spent.items() if seconds >= 0.3) + f"; {shown} |\n")


def occupied(device: torch.device, free: int) -> Tensor:
    """Takes memory of the GPU until `free` bytes of it are left, for as long as the tensor lives.

    Returns:
        uint8 [bytes taken], without values.

    Raises:
        SystemExit: less is free already.
    """
    has, _ = torch.cuda.mem_get_info()
    if has < free:
        raise SystemExit(f"--free: the GPU has {has / 1e9:.1f} GB free, less than {free / 1e9:.1f}")
    return torch.empty(has - free, dtype=torch.uint8, device=device)


def use_servers_on_gpu() -> None:
    """Makes the modules of tests/comfyui importable; their servers run on the GPU then, not on the CPU."""
    os.environ["DOPSD_TEST_GPU"] = "1"
    sys.path.insert(0, str(TESTS))


def main() -> None:
    """Writes the files, runs the workflows and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the files, 26 GB")
    parser.add_argument("--output", type=Path, help="ComfyUI's base directory, a temporary one if not given")
    parser.add_argument("--memory", nargs="+", default=["auto", "24 GB", "16 GB"], help="of D-OPSD Train LoRA")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each training")
    parser.add_argument("--side", type=int, default=1024, help="of the images in pixels")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    parser.add_argument(
        "--free", type=float_argument(0.1), help="GB of the GPU that ComfyUI finds free, as on a smaller card"
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one workflow")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU, and torch finds none")
    use_servers_on_gpu()
    from inprocess import new_base
    from live import Server

    device = torch.device("cuda")
    networks.pack(device)
    began = time.perf_counter()
    size = real_files.write(args.models, device)
    torch.cuda.empty_cache()
    say(f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}; ")
    say(f"{size / 1e9:.1f} GB of files after {time.perf_counter() - began:.0f} s\n")
    ballast = occupied(device, int(args.free * 1e9)) if args.free is not None else None
    base = new_base(args.output or Path(tempfile.mkdtemp()))
    (base / "models").rmdir()
    (base / "models").symlink_to(args.models.absolute(), target_is_directory=True)
    write_concept(base / "input" / "my_concept", args.side)
    server = Server(base, base / "server.log", threads=4)
    try:
        (device_seen,) = {each["name"] for each in server.get("/system_stats")["devices"]}
        say(f"server up after {server.boot_seconds:.1f} s, on {device_seen}\n\n")
        say("| workflow | seconds | s/step | peak GB | nodes |\n|---|---|---|---|---|\n")
        with watched(server.process.pid) as seen:
            for memory in args.memory:
                trained(server, seen, memory, args)
            sampled(server, seen, args)
    finally:
        server.stop()
        del ballast


if __name__ == "__main__":
    main()
