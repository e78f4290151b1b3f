"""Runs pytest on the pretend device; see the package's docstring.

    PYTHONPATH=tests python -m pretend_cuda MODE [--capability 7.5] [--memory 8e9] PYTEST_ARGUMENTS

Ends with 0 and without a word where there can be no device (`make cuda-device` has said why).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pretend_cuda import build
from pretend_cuda.modes import CAPABILITIES, MODES

HERE = Path(__file__).resolve().parent


def environment(mode: str, capability: str, memory: str) -> dict[str, str]:
    """What a process needs to have the device and, in ComfyUI, the mode."""
    return {
        "PYTHONPATH": str(HERE / "site"),
        "PRETEND_CUDA": mode,
        "PRETEND_CUDA_CAPABILITY": capability,
        "PRETEND_CUDA_MEMORY": memory,
        "DOPSD_TEST_GPU": "1",
        "DOPSD_TEST_FLAGS": " ".join(MODES[mode].flags),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="pretend_cuda", description="Runs pytest on the pretend device.")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--capability", choices=CAPABILITIES, default=CAPABILITIES[0])
    parser.add_argument("--memory", default="24e9", help="bytes of the card")
    chosen, arguments = parser.parse_known_args()
    if build.why_not():
        return
    build.build()
    env = {**os.environ, **environment(chosen.mode, chosen.capability, chosen.memory)}
    command = [sys.executable, "-m", "pytest", "-p", "pretend_cuda.plugin", *arguments]
    os.execve(sys.executable, command, env)


if __name__ == "__main__":
    main()
