"""The ComfyUI side: nodes parse, call the core, wrap. One file per topic; `host.py` is the core's host here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import CompareLoRA
from .conditions import BuildTeacherCondition, TeacherPreview
from .dataset import LoadDataset
from .initial_lora import LoadLoRA
from .loaders import LoadDemoModels, LoadTeacherVision
from .lora import SaveLoRA
from .sampler import FewStepSampler
from .train import TrainLoRA
from .whole_graph import register


class DopsdExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def on_load(self) -> None:
        register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadDataset,
            BuildTeacherCondition,
            TeacherPreview,
            TrainLoRA,
            FewStepSampler,
            SaveLoRA,
            CompareLoRA,
            LoadLoRA,
            LoadTeacherVision,
            LoadDemoModels,
        ]


async def comfy_entrypoint() -> DopsdExtension:
    """Called by ComfyUI once, at its start."""
    return DopsdExtension()
