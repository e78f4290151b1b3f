"""The node Save LoRA (D-OPSD)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from comfy_api.latest import io
from torch import Tensor

from ..dopsd_core.adapters import Lora
from ..dopsd_core.adapters.lora_file import save_lora, save_peft
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.lora_header import header_for, trigger_of
from .comfy_host.paths import lora_file_path, require_lora_name, shown
from .comfy_host.sockets import CATEGORY

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PREFIX = "transformer."


class SaveLoRA(io.ComfyNode):
    """Writes a LoRA file that ComfyUI and diffusers load at the same strength."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_SaveLoRA",
            display_name="Save LoRA (D-OPSD)",
            category=CATEGORY,
            description="Writes the LoRA to ComfyUI's output folder. ComfyUI's own LoRA loaders and diffusers load it "
            "at the same strength. The file's metadata says how it was trained.",
            search_aliases=["d-opsd", "export lora", "save lora"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.LoraModel.Input(
                    "lora", tooltip="From D-OPSD Train LoRA. Other trainers' LoRAs are saved as they are."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/dopsd",
                    optional=True,
                    tooltip="File name below the output folder; a number is added. Files in output/loras are listed by "
                    "the LoRA loaders (press R).",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="bf16",
                    optional=True,
                    tooltip="bf16: half the size, and what models run in. fp32: full precision, to train it further.",
                ),
                io.Boolean.Input(
                    "peft_folder",
                    default=False,
                    optional=True,
                    tooltip="Also write a folder that PeftModel.from_pretrained can load. Needs the package peft.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_path", tooltip="The file that was written.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """True, or what is wrong with the file name."""
        try:
            if isinstance(filename_prefix, str):  # else it comes over a link
                require_lora_name(filename_prefix)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(cls, lora, filename_prefix, dtype, peft_folder) -> io.NodeOutput:
        """Writes the file and shows its name, size and trigger."""
        path = lora_file_path(filename_prefix)
        write_lora(path, lora, DTYPES[dtype])
        lines = [shown(path), f"{len(lora)} tensors, {path.stat().st_size / 2**20:.1f} MB"]
        if trigger := trigger_of(getattr(lora, "facts", {})):
            lines.append(f"trigger: {trigger}")
        if peft_folder:
            folder = path.with_name(f"{path.stem}peft")
            write_peft(folder, lora, DTYPES[dtype])
            lines.append(f"{shown(folder)}/")
        send_text(cls, "\n".join(lines))
        return io.NodeOutput(str(path))


def write_lora(path: Path, lora: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes the tensors, such as lora_A [rank, in] and lora_B [out, rank], with their metadata in the header.

    Raises:
        ValueError: there are no tensors, or one is not finite.
    """
    header = header_for(path.stem.strip("_"), lora, getattr(lora, "facts", {}))
    save_lora(path, lora, _folded_config(1), prefix="", metadata=header, dtype=dtype)


def write_peft(folder: Path, lora: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a LoRA with lora_A [rank, in] and lora_B [out, rank] as a peft folder.

    Raises:
        ValueError: the LoRA does not have diffusers names, or its layers have different ranks.
        ImportError: peft is not installed.
    """
    bare = {key.removeprefix(_PREFIX): tensor for key, tensor in lora.items()}
    ranks = {tensor.shape[0] for key, tensor in bare.items() if key.endswith(".lora_A.weight")}
    named = all(key.startswith(_PREFIX) and ".lora_" in key for key in lora)
    if not named or len(ranks) != 1:
        raise ValueError("a peft folder needs a plain LoRA from D-OPSD Train LoRA: switch peft_folder off")
    save_peft(
        folder,
        bare,
        _folded_config(ranks.pop()),
        base_model=getattr(lora, "facts", {}).get("dopsd_base_model"),
        dtype=dtype,
    )


def _folded_config(rank: int) -> Lora:
    """With scale 1, since alpha is already folded into the tensors."""
    return Lora(rank=rank, alpha=rank, targets=("*",))
