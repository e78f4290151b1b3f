"""The ComfyUI side: nodes parse, call the core, wrap. One file per node; `comfy_host/` is what the core needs of it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .build_teacher_condition import BuildTeacherCondition
from .caption_images import CaptionImages
from .comfy_host.whole_graph import register
from .compare_lora import CompareLoRA
from .few_step_sampler import FewStepSampler
from .load_dataset import LoadDataset
from .load_demo_models import LoadDemoModels
from .load_lora import LoadLoRA
from .load_teacher_vision import LoadTeacherVision
from .lora_report_card import LoRAReportCard
from .save_lora import SaveLoRA
from .teacher_preview import TeacherPreview
from .train_lora import TrainLoRA
from .training_settings import TrainingSettings


class DopsdExtension(ComfyExtension):
    """The nodes of this pack, as ComfyUI registers them."""

    async def on_load(self) -> None:
        """Registers the check that no invalid node of ours is silently skipped."""
        register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node class of this pack."""
        return [
            LoadDataset,
            CaptionImages,
            BuildTeacherCondition,
            TeacherPreview,
            TrainLoRA,
            TrainingSettings,
            FewStepSampler,
            SaveLoRA,
            CompareLoRA,
            LoRAReportCard,
            LoadLoRA,
            LoadTeacherVision,
            LoadDemoModels,
        ]


async def comfy_entrypoint() -> DopsdExtension:
    """The extension; ComfyUI calls this once when it starts."""
    return DopsdExtension()
