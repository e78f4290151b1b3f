"""A LoRA to go on from: read from a file of any trainer, and put on what the trainer trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..dopsd_core.adapters.lora_import import import_lora, lora_digest, read_lora
from ..dopsd_core.config import TrainConfig
from .comfy_host.denoiser import ComfyDenoiser
from .comfy_host.sockets import CATEGORY, TrainedLora


@dataclass(frozen=True, eq=False)
class Start:
    """tensors: for `train(initial=...)`; None without a LoRA. identity: what it adds to the run's. notes: for the
    user."""

    tensors: Mapping[str, Tensor] | None = None
    identity: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def start_of(lora: Mapping[str, Tensor] | None, denoiser: ComfyDenoiser, config: TrainConfig) -> Start:
    """The start that a LORA_MODEL of any trainer gives the run.

    Raises:
        ValueError: it is no plain LoRA, of another model, or changes nothing that is trained.
    """
    if lora is None:
        return Start()
    imported = import_lora(lora, denoiser.sites(), config.adapter.targets)
    notes = ()
    if left_out := imported.left_out:
        notes = (f"{len(left_out)} tensors of initial_lora are not trained and left out, such as {left_out[0]}",)
    return Start(imported.tensors, (lora_digest(imported.tensors),), notes)


class LoadLoRA(io.ComfyNode):
    """A LoRA file as LORA_MODEL; ComfyUI's own loaders put it on a MODEL at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_LoadLoRA",
            display_name="Load LoRA (D-OPSD)",
            category=CATEGORY,
            description="Reads a LoRA file to train it further, or to compare it. Any trainer's will do: D-OPSD, "
            "ai-toolkit, musubi-tuner, diffusers, peft, ComfyUI's own.",
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
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> Any:
        facts = os.stat(folder_paths.get_full_path_or_raise("loras", lora_name))
        return facts.st_size, facts.st_mtime_ns

    @classmethod
    def execute(cls, lora_name: str) -> io.NodeOutput:
        return io.NodeOutput(TrainedLora(read_lora(folder_paths.get_full_path_or_raise("loras", lora_name)), {}))
