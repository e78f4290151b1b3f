"""The node Load LoRA (D-OPSD): reads a LoRA file of any trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from safetensors import safe_open

from ..dopsd_core.adapters.lora_import import read_lora
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.lora_fit import require_finite
from .comfy_host.lora_header import kept_header, trigger_of
from .comfy_host.paths import stamp_of
from .comfy_host.sockets import CATEGORY, TrainedLora


def load_with_header(path: Path) -> tuple[TrainedLora, tuple[str, ...]]:
    """A LoRA file with its header, and one line for each header entry that is not kept.

    Raises:
        ValueError: it is not a safetensors file, not a LoRA, or not finite.
    """
    tensors = read_lora(path)
    require_finite(path.name, tensors)
    with safe_open(path, "pt") as file:
        header, notes = kept_header(file.metadata() or {})
    return TrainedLora(tensors, header), notes


class LoadLoRA(io.ComfyNode):
    """A LoRA file as LORA_MODEL; ComfyUI's own loaders apply it to a MODEL instead."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_LoadLoRA",
            display_name="Load LoRA (D-OPSD)",
            category=CATEGORY,
            description="Reads a LoRA file, to continue training it or to compare it. Works with LoRAs of any trainer: "
            "D-OPSD, ai-toolkit, musubi-tuner, diffusers, peft, ComfyUI's own.",
            search_aliases=["d-opsd", "continue training", "resume lora", "initial lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file in models/loras or output/loras.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora", tooltip="For initial_lora of D-OPSD Train LoRA, or for Compare LoRA."
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.dynprompt],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> Any:
        """Changes when the file is replaced, so that ComfyUI runs the node again."""
        return stamp_of(folder_paths.get_full_path_or_raise("loras", lora_name))

    @classmethod
    @checked
    def execute(cls, lora_name: str) -> io.NodeOutput:
        """Reads the file and shows its size and trigger."""
        lora, notes = load_with_header(Path(folder_paths.get_full_path_or_raise("loras", lora_name)))
        trigger = trigger_of(lora.facts)
        lines = [f"{len(lora)} tensors", *([f"trigger: {trigger}"] if trigger else []), *notes]
        send_text(cls, "\n".join(lines))
        return io.NodeOutput(lora)
