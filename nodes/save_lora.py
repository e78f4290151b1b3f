"""The node Save LoRA (D-OPSD)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..dopsd_core.adapters import Lora
from ..dopsd_core.adapters.lora_file import save_lora, save_peft
from ..dopsd_core.files.atomic import write_atomic
from ..dopsd_core.files.disk import writing
from ..dopsd_core.files.lock import one_at_a_time
from ..dopsd_core.sharing.model_card import model_card
from ..dopsd_core.sharing.model_spec import Description
from ..dopsd_core.sharing.thumbnail import jpeg_thumbnail
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.lora_header import header_for, trigger_of
from .comfy_host.paths import lora_file_path, require_lora_name, saving_lock, shown
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
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
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
                *_sharing_inputs(),
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
    def execute(cls, lora, filename_prefix, dtype, peft_folder, hub_folder, thumbnail=None, **said) -> io.NodeOutput:
        """Writes the file and shows its name, size and trigger; `said` are the texts for others by id."""
        given = Description(**said, thumbnail=_jpeg(thumbnail))
        path, lines = saved(filename_prefix, lora, DTYPES[dtype], given, peft_folder, hub_folder)
        send_text(cls, "\n".join(lines))
        return io.NodeOutput(str(path))


def saved(prefix: str, lora: Mapping[str, Tensor], *how: Any) -> tuple[Path, list[str]]:
    """The next free path of `lora_file_path` and what `written` says of it.

    lora: tensors such as lora_A [rank, in]; this and `how` as for `written`.

    Two servers on one output folder take turns: they would find the same number, and one LoRA would be lost.
    """
    with one_at_a_time(saving_lock()):
        path = lora_file_path(prefix)
        return path, written(path, lora, *how)


def written(
    path: Path, lora: Mapping[str, Tensor], dtype: torch.dtype, given: Description, has_peft: bool, has_hub: bool
) -> list[str]:
    """Writes the file, of tensors such as lora_A [rank, in], and the folders; returns what they are, a line each.

    Raises:
        ValueError: there are no tensors, one is not finite, or they do not fit into a peft folder.
        ImportError: peft is not installed.
        DiskError: a file cannot be written.
    """
    if has_peft:
        require_peft(lora)  # before anything is written: each try would leave another numbered file
    write_lora(path, lora, dtype, given)
    lines = [shown(path), f"{len(lora)} tensors, {path.stat().st_size / 2**20:.1f} MB"]
    if trigger := trigger_of(getattr(lora, "facts", {})):
        lines.append(f"trigger: {trigger}")
    if has_peft:
        folder = path.with_name(f"{path.stem}peft")
        write_peft(folder, lora, dtype)
        lines.append(f"{shown(folder)}/")
    if has_hub:
        folder = path.with_name(f"{path.stem}hub")
        write_hub(folder, path.stem.strip("_"), lora, dtype, given)
        lines.append(f"{shown(folder)}/")
    return lines


def _sharing_inputs() -> list[Any]:
    """What is said to others: written into the file's header and the card."""
    return [
        io.String.Input(
            "title",
            default="",
            optional=True,
            tooltip="The LoRA's name for others, in the file's header. Empty: the file name.",
        ),
        io.String.Input(
            "description",
            default="",
            multiline=True,
            optional=True,
            tooltip="What it does and how to prompt it, for others; Markdown. In the file's header and the card.",
        ),
        io.String.Input("author", default="", optional=True, tooltip="Who made it, in the file's header."),
        io.String.Input(
            "license",
            default="",
            optional=True,
            tooltip="Its licence, such as apache-2.0 or cc-by-4.0. The base model's licence may allow only some.",
        ),
        io.Boolean.Input(
            "hub_folder",
            default=False,
            optional=True,
            tooltip="Also write a folder to upload to the Hugging Face Hub: the LoRA, its card README.md, and the "
            "thumbnail.",
        ),
        io.Image.Input(
            "thumbnail",
            optional=True,
            tooltip="An image that managers show for the file: the middle of the first one is stored in its header.",
        ),
    ]


def _jpeg(thumbnail: Tensor | None) -> bytes:
    return b"" if thumbnail is None else jpeg_thumbnail(thumbnail[0])


def write_lora(path: Path, lora: Mapping[str, Tensor], dtype: torch.dtype, given: Description) -> dict[str, str]:
    """Writes the tensors, such as lora_A [rank, in] and lora_B [out, rank], and returns the header.

    given: what the user says of it; without a title it is the file's name.

    Raises:
        ValueError: there are no tensors, or one is not finite.
    """
    header = header_for(path.stem.strip("_"), lora, getattr(lora, "facts", {}), given)
    save_lora(path, lora, _folded_config(1), prefix="", metadata=header, dtype=dtype)
    return header


def write_hub(folder: Path, name: str, lora: Mapping[str, Tensor], dtype: torch.dtype, given: Description) -> None:
    """Writes a folder for the Hugging Face Hub: <name>.safetensors, README.md and, if there is one, thumbnail.jpg.

    lora: tensors such as lora_A [rank, in] and lora_B [out, rank].

    Raises:
        DiskError: the folder cannot be written.
    """
    header = write_lora(folder / f"{name}.safetensors", lora, dtype, given)
    thumbnail = "thumbnail.jpg" if given.thumbnail else ""
    with writing(folder):
        if thumbnail:
            write_atomic(folder / thumbnail, given.thumbnail)
        write_atomic(folder / "README.md", model_card(header, f"{name}.safetensors", thumbnail).encode())


def require_peft(lora: Mapping[str, Tensor]) -> int:
    """The rank of a LoRA with lora_A [rank, in] and lora_B [out, rank] that can be written as a peft folder.

    Raises:
        ValueError: the LoRA does not have diffusers' names, is a DoRA or LoKr, or its layers have different ranks.
        ImportError: peft is not installed.
    """
    ranks = {tensor.shape[0] for key, tensor in lora.items() if key.endswith(".lora_A.weight")}
    named = all(key.startswith(_PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in lora)
    if not named or len(ranks) != 1:
        raise ValueError("a peft folder needs a plain LoRA from D-OPSD Train LoRA: switch peft_folder off")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting a peft folder needs peft: pip install peft, or switch peft_folder off") from error
    return ranks.pop()


def write_peft(folder: Path, lora: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a LoRA with lora_A [rank, in] and lora_B [out, rank] as a peft folder.

    Raises:
        ValueError: the LoRA does not have diffusers names, or its layers have different ranks.
        ImportError: peft is not installed.
    """
    bare = {key.removeprefix(_PREFIX): tensor for key, tensor in lora.items()}
    save_peft(
        folder,
        bare,
        _folded_config(require_peft(lora)),
        base_model=getattr(lora, "facts", {}).get("dopsd_base_model"),
        dtype=dtype,
    )


def _folded_config(rank: int) -> Lora:
    """With scale 1, since alpha is already folded into the tensors."""
    return Lora(rank=rank, alpha=rank, targets=("*",))
