"""Measures the cost of the digest of a 12 GB model, with a file of zeros and noise, memory-mapped as in ComfyUI.

    python -m benchmarks.identity_cost                # the digest alone, on mapped tensors
    python -m benchmarks.identity_cost --comfyui      # a MODEL in ComfyUI ($COMFYUI_PATH), its weights the mapped ones

The file has the layers of Z-Image in bf16; every second one is noise, the others are zeros that take no room on the
disk. It is written to a temporary folder (--folder: another one) and deleted afterwards. cold: the file is not in the
operating system's cache (Linux only, and only as far as it lets go of it); warm: it is; again: with its pages mapped,
as in a second run of one session; by file: the digest is remembered by the file's size and time.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dopsd_core.identity.tensor_digest import COVERED_BYTES, Content, digest_tensors

WIDTH, HIDDEN, TIME = 3840, 10240, 256
BLOCK = {
    "attention.qkv.weight": (3 * WIDTH, WIDTH), "attention.out.weight": (WIDTH, WIDTH),
    "feed_forward.w1.weight": (HIDDEN, WIDTH), "feed_forward.w2.weight": (WIDTH, HIDDEN),
    "feed_forward.w3.weight": (HIDDEN, WIDTH), "adaLN.weight": (4 * WIDTH, TIME),
    "attention_norm1.weight": (WIDTH,), "attention_norm2.weight": (WIDTH,), "ffn_norm1.weight": (WIDTH,),
    "ffn_norm2.weight": (WIDTH,),
}  # fmt: skip
BLOCKS = 34
_CHUNK = 2**22


def main() -> None:
    """Writes the file, measures, prints."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "big.safetensors"
        write_file(path, arguments.blocks)
        print(f"{_machine()}\n{path.stat().st_size / 1e9:.1f} GB, every second tensor noise")
        measure: Callable[[Path, int], Iterator[tuple[str, list[float]]]]
        measure = of_a_model if arguments.comfyui else of_tensors
        for what, seconds in measure(path, arguments.repeats):
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"{what:14s} {statistics.median(seconds):6.2f} s (of {len(seconds)}: {spread})", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comfyui", action="store_true", help="measure nodes/comfy_host/identity.py on a MODEL in ComfyUI"
    )
    parser.add_argument("--folder", type=Path, help="where the file is written for as long as it is needed")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"fewer than {BLOCKS} make a smaller file")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each figure")
    return parser.parse_args()


def write_file(path: Path, blocks: int) -> None:
    """A safetensors file of bf16 tensors, every second one noise, the others holes."""
    header, end = {}, 0
    for block in range(blocks):
        for name, shape in BLOCK.items():
            size = 2 * torch.Size(shape).numel()
            header[f"layers.{block}.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = os.urandom(_CHUNK)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        file.truncate(begin + end)
        for entry in list(header.values())[::2]:
            first, last = entry["data_offsets"]
            file.seek(begin + first)
            for place in range(first, last, _CHUNK):
                file.write(noise[: last - place])
        os.fsync(file.fileno())


def of_tensors(path: Path, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Of the digest itself, each time on a new mapping of the file."""
    print(f"every row of {min(COVERED_BYTES, path.stat().st_size) / 1e9:.1f} GB of it is sampled")

    def digest() -> float:
        contents = [Content(tensor) for tensor in mapped(path).values()]
        return _seconds(lambda: list(digest_tensors(contents)))

    if _forget(path):
        yield "cold", [_seconds_after(_forget, path, digest) for _ in range(repeats)]
    digest()
    yield "warm", [digest() for _ in range(repeats)]
    contents = [Content(tensor) for tensor in mapped(path).values()]
    list(digest_tensors(contents))
    yield "again", [_seconds(lambda: list(digest_tensors(contents))) for _ in range(repeats)]


def of_a_model(path: Path, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Of a MODEL's identity, its layers made of the mapped tensors as ComfyUI's dynamic VRAM does it."""
    pack = _comfyui()
    identity, weights = pack.module("nodes.comfy_host.identity"), pack.module("nodes.comfy_host.weights")
    is_mapped = weights._is_mapped

    def measured() -> float:
        model = model_of(path)
        return _seconds(lambda: pack.call(identity.identity_of, model))

    weights._is_mapped = lambda tensor: False
    if _forget(path):
        yield "cold", [_seconds_after(_forget, path, measured) for _ in range(repeats)]
    measured()
    yield "warm", [measured() for _ in range(repeats)]
    model = model_of(path)
    pack.call(identity.identity_of, model)
    yield "again", [_seconds(lambda: pack.call(identity.identity_of, model)) for _ in range(repeats)]
    weights._is_mapped = is_mapped
    measured()
    yield "by file", [measured() for _ in range(repeats)]
    if _forget(path):
        yield "by file, cold", [_seconds_after(_forget, path, measured) for _ in range(repeats)]
    pack.close()


def mapped(path: Path) -> dict[str, Tensor]:
    """The file's tensors of any shape, none of them read yet, marked as ComfyUI's own loader marks them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    for tensor in tensors.values():
        tensor.untyped_storage()._comfy_tensor_file_slice = True  # type: ignore[attr-defined]
    return tensors


def model_of(path: Path) -> Any:
    """A ModelPatcher over a network with these weights, which no device ever holds."""
    import comfy.model_patcher

    network = nn.Module()
    for name, tensor in mapped(path).items():
        place = network
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    patcher.cached_patcher_init = (model_of, (str(path),))
    return patcher


def _comfyui() -> Any:
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "comfyui"))
    import inprocess

    inprocess.put_first_on_path()
    return inprocess.ComfyUI(inprocess.new_base(Path(tempfile.mkdtemp())))


def _forget(path: Path) -> bool:
    """Has the operating system let go of the file, which nothing may have mapped then; False where it cannot."""
    gc.collect()
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _seconds_after(prepare: Callable[[Path], Any], path: Path, measure: Callable[[], float]) -> float:
    prepare(path)
    return measure()


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _machine() -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{datetime.date.today()}, {platform.platform()}, {cores}, torch {torch.__version__}{load}"


if __name__ == "__main__":
    main()
