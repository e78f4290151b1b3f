"""Builds the pretend device's library for this environment's torch: 20 s, once per torch, its folder and source.

    PYTHONPATH=tests python -m pretend_cuda.build      # says where the library is, or why there is none

The library goes into the environment (`pretend_cuda/` below sys.prefix) or into $PRETEND_CUDA_CACHE. torch is not
imported: the library must be loaded before it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "libpretend_cuda.so"
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-D_GLIBCXX_USE_CXX11_ABI=1")


def why_not() -> str:
    """Why there cannot be a pretend device here, in one line; "" when there can."""
    if sys.platform != "linux":
        return "the pretend CUDA device is written for Linux"
    if not (torch := _torch_folder()):
        return "torch is not installed"
    if not re.search(r"^cuda\b.*= None$", (torch / "version.py").read_text(encoding="utf-8"), re.MULTILINE):
        return "this torch has a real CUDA, and the pretend device takes its place in a CPU build only"
    if not library().exists() and not compiler():
        return "no C++ compiler: install g++ or clang++, or set CXX"
    return ""


def compiler() -> str:
    """The C++ compiler to use, "" without one."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), "")


def library() -> Path:
    """Where the library for this source and this torch is, or would be."""
    cache = Path(os.environ.get("PRETEND_CUDA_CACHE") or Path(sys.prefix) / "pretend_cuda")
    built_from = repr((FLAGS, str(_torch_folder())))  # it looks for torch's libraries where they were when it was built
    digest = hashlib.sha256(SOURCE.read_bytes() + built_from.encode()).hexdigest()[:12]
    return cache / f"torch-{importlib.metadata.version('torch')}-{digest}" / NAME


def build() -> Path:
    """The library, compiled if it is not there yet.

    Raises:
        RuntimeError: there can be no pretend device here, or the compiler failed; the message says why.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    path, torch = library(), _torch_folder()
    if path.exists() or torch is None:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / NAME
        include, lib = torch / "include", torch / "lib"
        headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        libraries = [f"-L{lib}", "-ltorch_cpu", "-lc10", "-ltorch", f"-Wl,-rpath,{lib}"]
        command = [compiler(), *FLAGS, *headers, str(SOURCE), "-o", str(made), *libraries]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"the pretend CUDA device does not compile:\n{run.stderr[-3000:]}")
        os.replace(made, path)  # two processes may build at once
    return path


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def main() -> None:
    """Builds it, or says in one loud line why what needs it is not tested."""
    reason = why_not()
    if not reason:
        print(f"pretend CUDA device: {build()}")
        return
    print(f"NO PRETEND CUDA DEVICE: {reason}; the paths of a GPU will not be tested")
    if os.environ.get("DOPSD_REQUIRE_CUDA", "") not in ("", "0"):
        sys.exit(1)


if __name__ == "__main__":
    main()
