"""Weights of the paper's metrics in ComfyUI: the folder models/dopsd_metrics, and a CLIP that answers questions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths

from ...dopsd_core.metrics.measures import Metrics
from ...dopsd_core.metrics.needs import MetricUnavailable
from ...dopsd_core.metrics.vlm_questions import MAX_NEW_TOKENS, Ask, VlmJudge
from .clip_answers import answer, can_answer
from .lora_use import NONE

FOLDER = "dopsd_metrics"
"""Folder below models/, and key in extra_model_paths.yaml; each entry is a file or folder of weights."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ROOM = 2.0
"""Device memory that is freed for a metric, over the size of its weights."""

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def weight_choices() -> list[str]:
    """ "none", and the names of all files and folders of weights, without hidden ones."""
    found = [NONE]
    for folder in folder_paths.get_folder_paths(FOLDER):
        if os.path.isdir(folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            found += [e.name for e in entries if _is_weights(e)]
    return list(dict.fromkeys(found))


def _is_weights(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and (entry.is_dir() or entry.name.lower().endswith(_SUFFIXES))


def load_chosen(chosen: Mapping[str, str], judge: Any | None, kind: str) -> Metrics:
    """The metrics whose weights were chosen, on ComfyUI's device.

    Args:
        chosen: a choice of `weight_choices` by metric: dino, lpips, clip.
        judge: a CLIP that answers questions about images; None for no VLM-J.
        kind: "instance" or "style".

    Raises:
        MetricUnavailable: packages or weights are missing, or the CLIP does not answer questions about images.
    """
    from ...dopsd_core.metrics.loading import load_metrics

    weights = {name: _path(choice) for name, choice in chosen.items()}
    device = comfy.model_management.get_torch_device()
    needed = sum(_size(Path(path)) for path in weights.values() if path is not None)
    if needed:
        comfy.model_management.free_memory(_ROOM * needed, device)
    loaded = load_metrics(weights, device=device)
    vlm = None if judge is None else VlmJudge(ask_with(judge), kind)
    return Metrics(loaded.dino, loaded.lpips, loaded.clip, vlm)


def ask_with(clip: Any) -> Ask:
    """Questions about images to a CLIP that can generate text, such as Qwen3-VL's.

    Raises:
        MetricUnavailable: it cannot.
    """
    if not can_answer(clip, 2):
        raise MetricUnavailable(
            "the CLIP connected to judge cannot answer questions about two images: load qwen3vl_4b or qwen3vl_8b with "
            "Load CLIP, or disconnect judge"
        )
    return lambda images, question: answer(clip, images, question, MAX_NEW_TOKENS)


def _path(choice: str) -> str | None:
    """The file or folder of a choice.

    Raises:
        MetricUnavailable: it is gone.
    """
    if choice == NONE:
        return None
    for folder in folder_paths.get_folder_paths(FOLDER):
        path = os.path.join(folder, choice)
        if os.path.basename(choice) == choice and os.path.exists(path):
            return path
    raise MetricUnavailable(f"there is no {choice} in models/{FOLDER}: choose another, or none")


def _size(path: Path) -> int:
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.suffix in _SUFFIXES)
