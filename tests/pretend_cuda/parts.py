"""What `make test-cuda` runs: a few strong tests in every mode, the broad ones in the two that users have. `make test`
runs the few strong ones of the core's and of one mode.

    python -m pretend_cuda part dynamic

`make test-cuda-all` runs all of tests/comfyui in every mode, and writes the table of docs/reliability.md.
"""

from __future__ import annotations

from dataclasses import dataclass

CORE = (
    "activation_offloading",
    "adapters",
    "casts",
    "checkpointing",
    "frozen",
    "lora_import",
    "objectives",
    "rollout",
    "training_set",
    "transfer",
)
"""Tests of the core that compute where $DOPSD_TEST_DEVICE says."""
NODES = ("bases", "training", "users_objects")
"""Tests inside ComfyUI: whole trainings of both families, on every base, and the user's objects after every ending."""
DYNAMIC = ("stock_files", "live")
"""Those that run once, in the mode that users have: ComfyUI's loaders, and a server."""


@dataclass(frozen=True)
class Part:
    """mode: of modes.py. arguments: of pytest."""

    mode: str
    capability: str
    arguments: tuple[str, ...]


def _files(folder: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{folder}/test_{name}.py" for name in names)


_FUSED_ATTENTION = "tests/test_checkpointing.py::test_saved_bytes_are_as_predicted"  # it is CUDA's, and keeps less
_OBJECTS = "tests/comfyui/on_cuda/test_objects.py"  # two thirds of the time of the central ones
_CENTRAL = ("-m", "central", "tests/comfyui/on_cuda")

PARTS = {
    "core": Part("core", "8.9", ("tests/on_cuda", *_files("tests", CORE), "--deselect", _FUSED_ATTENTION)),
    "dynamic": Part("dynamic", "8.9", ("tests/comfyui/on_cuda", *_files("tests/comfyui", (*NODES, *DYNAMIC)))),
    "classic": Part("classic", "8.9", ("tests/comfyui/on_cuda", *_files("tests/comfyui", (*NODES, "klein_nodes")))),
    "novram": Part("novram", "8.9", _CENTRAL),
    "lowvram": Part("lowvram", "8.9", _CENTRAL),
    "highvram": Part("highvram", "8.9", _CENTRAL),
    "dynamic-turing": Part("dynamic", "7.5", _CENTRAL),
    "classic-turing": Part("classic", "7.5", _CENTRAL),
}
OFTEN = {
    "core-central": Part("core", "8.9", ("tests/on_cuda",)),
    "dynamic-central": Part("dynamic", "8.9", (*_CENTRAL, "--ignore", _OBJECTS)),
}
"""For `make test` alone: parts of `core` and `dynamic`, which have what is left out here."""
