"""The ComfyUI side: nodes parse, call the core, wrap. One file per node or topic; `comfy_host/` is the core's host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .comfy_host.whole_graph import register
from .compare_lora import CompareLoRA
from .conditions import BuildTeacherCondition, TeacherPreview
from .few_step_sampler import FewStepSampler
from .load_dataset import LoadDataset
from .load_lora import LoadLoRA
from .loaders import LoadDemoModels, LoadTeacherVision
from .save_lora import SaveLoRA
from .train_lora import TrainLoRA


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
