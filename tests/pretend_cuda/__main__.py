"""Runs pytest on the pretend device; see the package's docstring.

    PYTHONPATH=tests python -m pretend_cuda MODE [--capability 7.5] [--memory 8e9] PYTEST_ARGUMENTS
    PYTHONPATH=tests python -m pretend_cuda part NAME PYTEST_ARGUMENTS

Where there can be no device it ends with 0 and without a word: `make cuda-device` has said why.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pretend_cuda import build
from pretend_cuda.modes import CAPABILITIES, MODES
from pretend_cuda.parts import OFTEN, PARTS, Part

HERE = Path(__file__).resolve().parent


def environment(mode: str, capability: str, memory: str = "24e9") -> dict[str, str]:
    """What a process needs to have the device and, in ComfyUI, the mode."""
    return {
        "PYTHONPATH": str(HERE / "site"),
        "PRETEND_CUDA": mode,
        "PRETEND_CUDA_CAPABILITY": capability,
        "PRETEND_CUDA_MEMORY": memory,
        "DOPSD_TEST_GPU": "1",
        "DOPSD_TEST_DEVICE": "cuda",
        "DOPSD_TEST_FLAGS": " ".join(MODES[mode].flags),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "pretend_cuda.plugin", *arguments]


def parsed() -> tuple[Part, str]:
    """What to run, and the bytes of the card."""
    parser = argparse.ArgumentParser(prog="pretend_cuda", description="Runs pytest on the pretend device.")
    parser.add_argument("mode", choices=[*MODES, "part"])
    parser.add_argument("--capability", choices=CAPABILITIES, default=CAPABILITIES[0])
    parser.add_argument("--memory", default="24e9", help="bytes of the card")
    chosen, arguments = parser.parse_known_args()
    if chosen.mode != "part":
        return Part(chosen.mode, chosen.capability, tuple(arguments)), chosen.memory
    parts = PARTS | OFTEN
    if not arguments or arguments[0] not in parts:
        parser.error(f"a part is one of {', '.join(parts)}")
    part = parts[arguments[0]]
    return Part(part.mode, part.capability, (*part.arguments, *arguments[1:])), chosen.memory


def main() -> None:
    part, memory = parsed()
    if build.why_not():
        return
    build.build()
    env = {**os.environ, **environment(part.mode, part.capability, memory)}
    os.execve(sys.executable, pytest_command(*part.arguments), env)


if __name__ == "__main__":
    main()
