"""The node Load Teacher Vision: ComfyUI's own loaders cannot load a vision tower without its language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .comfy_host.checked_inputs import checked
from .comfy_host.paths import stamp_of
from .comfy_host.sockets import CATEGORY, VisionSocket
from .comfy_host.vision_file import load_teacher_vision, tower_files


class LoadTeacherVision(io.ComfyNode):
    """The vision tower of a Qwen3-VL-4B file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_LoadTeacherVision",
            display_name="Load Teacher Vision",
            category=CATEGORY,
            description="Loads the vision tower of Qwen3-VL-4B (0.8 GB), through which the teacher sees images. The "
            "text is read by the Qwen3-4B that Load CLIP loads for Z-Image or FLUX.2-klein 4B; the language model in "
            "this file is not loaded. Krea 2 does not need it: its text encoder has a vision tower.",
            search_aliases=["dopsd", "qwen3-vl"],
            inputs=[
                io.Combo.Input(
                    "vision_name",
                    options=folder_paths.get_filename_list("text_encoders"),
                    tooltip="A Qwen3-VL-4B file in models/text_encoders, plain or fp8-scaled, such as "
                    "qwen3vl_4b_fp8_scaled.safetensors. If the model is split into several files, choose any of them.",
                ),
            ],
            outputs=[
                VisionSocket.Output(display_name="vision", tooltip="The vision tower, for Build Teacher Condition.")
            ],
            hidden=[io.Hidden.prompt, io.Hidden.dynprompt],
        )

    @classmethod
    def fingerprint_inputs(cls, vision_name: str) -> Any:
        """Changes when the file is replaced, so that ComfyUI runs the node again."""
        return [stamp_of(file) for file in tower_files(cls._path(vision_name))]

    @classmethod
    @checked
    def execute(cls, vision_name: str) -> io.NodeOutput:
        """Loads the tower; nothing else of the file is read."""
        return io.NodeOutput(load_teacher_vision(cls._path(vision_name)))

    @staticmethod
    def _path(vision_name: str) -> Path:
        return Path(folder_paths.get_full_path_or_raise("text_encoders", vision_name))
