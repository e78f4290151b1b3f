"""What comes after training: the file, and the look at what it does."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..dopsd_core import __version__
from ..dopsd_core.lora_config import LoraConfig
from ..dopsd_core.lora_file import save_lora, save_peft
from ..dopsd_core.sheet import Row, contact_sheet, to_pixels
from .host import default_steps, family_of, send_text
from .paths import lora_file_path, shown
from .sampler import few_step_sample
from .sockets import CATEGORY

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NONE = "none"
MAX_STRENGTHS, MAX_PROMPTS, MAX_STRENGTH = 8, 32, 10.0
_PREFIX = "transformer."


# -- saving ------------------------------------------------------------------------------------------------------------


class SaveLoRA(io.ComfyNode):
    """A LoRA as a file that ComfyUI and diffusers load at equal strength."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_SaveLoRA",
            display_name="Save LoRA (D-OPSD)",
            category=CATEGORY,
            description="Writes the LoRA to ComfyUI's output folder under names that ComfyUI's own LoRA loaders and "
            "diffusers read at equal strength, with the facts of its training in the header.",
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
                    tooltip="Name below the output folder; a number is added. What is in output/loras shows up in the "
                    "LoRA loaders (press R).",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    tooltip="bf16 is half as large and what models run in. fp32 keeps every bit, for further training.",
                ),
                io.Boolean.Input(
                    "peft_folder",
                    default=False,
                    tooltip="Also write a folder beside the file that PeftModel.from_pretrained reads. Needs peft.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_path", tooltip="The file that was written.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, dtype, peft_folder) -> io.NodeOutput:
        path = lora_file_path(filename_prefix)
        write_lora(path, lora, DTYPES[dtype])
        text = f"{shown(path)}\n{len(lora)} tensors, {path.stat().st_size / 2**20:.1f} MB"
        if peft_folder:
            folder = path.with_name(f"{path.stem}peft")
            write_peft(folder, lora, DTYPES[dtype])
            text += f"\n{shown(folder)}/"
        send_text(cls, text)
        return io.NodeOutput(str(path))


def write_lora(path: Path, lora: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The tensors under their own names, with what is known of them in the header.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    facts: Mapping[str, str] = getattr(lora, "facts", {})
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": f"{facts.get('dopsd_family', 'unknown')}/lora",
        "modelspec.title": path.stem.strip("_"),
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dopsd_version": __version__,
        **facts,
    }
    save_lora(path, lora, _folded_config(1), prefix="", metadata=header, dtype=dtype)


def write_peft(folder: Path, lora: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The same weights as a peft folder.

    Raises:
        ValueError: the LoRA has no diffusers names or no single rank.
        ImportError: peft is not installed.
    """
    bare = {key.removeprefix(_PREFIX): tensor for key, tensor in lora.items()}
    ranks = {tensor.shape[0] for key, tensor in bare.items() if key.endswith(".lora_A.weight")}
    named = all(key.startswith(_PREFIX) and ".lora_" in key for key in lora)
    if not named or len(ranks) != 1:
        raise ValueError("a peft folder needs a LoRA of D-OPSD Train LoRA; switch peft_folder off for this one")
    save_peft(
        folder,
        bare,
        _folded_config(ranks.pop()),
        base_model=getattr(lora, "facts", {}).get("dopsd_base_model"),
        dtype=dtype,
    )


def _folded_config(rank: int) -> LoraConfig:
    """Scale 1: alpha is in the tensors already."""
    return LoraConfig(rank=rank, alpha=rank, targets=("*",))


# -- comparing ---------------------------------------------------------------------------------------------------------


class CompareLoRA(io.ComfyNode):
    """Prompts x strengths in one picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        pixels = {"default": 1024, "min": 64, "max": 4096, "step": 16}
        return io.Schema(
            node_id="DOPSD_CompareLoRA",
            display_name="Compare LoRA",
            category=CATEGORY,
            description="Draws every prompt without the LoRA and with it at each strength, from the same noise, in one "
            "labelled grid. The LoRA is applied by ComfyUI's own loader: this is what you will get.",
            search_aliases=["d-opsd", "lora grid", "xy plot", "test lora"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained for, without the LoRA."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line. Take some with the trigger word, and some without, "
                    "which should not change.",
                ),
                io.String.Input(
                    "strengths", default="1.0", tooltip="Strengths of the LoRA, with commas between: 0.5, 1.0, 1.5."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,  # two runs, two files, one noise
                    tooltip="Noise of the first prompt; each further prompt has the next seed. One row, one noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Sampling steps; 0 takes what the model was made for.",
                ),
                io.Int.Input("width", tooltip="Width of each picture in pixels. The demo model's is 64.", **pixels),
                io.Int.Input("height", tooltip="Height of each picture in pixels. The demo model's is 64.", **pixels),
                io.Combo.Input(
                    "lora_name",
                    options=[NONE, *folder_paths.get_filename_list("loras")],
                    tooltip="A LoRA file. Not read when a lora is connected.",
                ),
                io.LoraModel.Input(
                    "lora", optional=True, tooltip="A LoRA from D-OPSD Train LoRA, without saving it first."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The grid.")],
        )

    @classmethod
    def validate_inputs(cls, strengths: str | None = None) -> bool | str:
        try:
            if strengths is not None:
                parse_strengths(strengths)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, strengths, seed, steps, width, height, lora_name, lora=None
    ) -> io.NodeOutput:
        texts, wanted = parse_prompts(prompts), parse_strengths(strengths)
        name, tensors = chosen_lora(lora_name, lora)
        send_text(cls, f"{name}: {count_used(model, tensors)} of {len(tensors)} tensors fit and are used")
        variants = {"base": model}
        for strength in wanted:
            variants[f"strength {strength:g}"] = apply_lora(model, tensors, strength)
        painter = _Painter(clip, vae, width, height, steps, len(texts) * len(variants))
        columns = [painter.draw(variant, texts, seed) for variant in variants.values()]
        image = to_pixels(draw_grid(f"{name}, seed {seed}", texts, list(variants), columns))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def parse_strengths(text: str) -> list[float]:
    """ "0.5, 1" -> [0.5, 1.0].

    Raises:
        ValueError: no number, too many, or one out of range.
    """
    words = text.replace(";", ",").replace("\n", ",").split(",")
    found: list[float] = []
    for word in (word.strip() for word in words if word.strip()):
        try:
            value = float(word)
        except ValueError:
            raise ValueError(
                f"strengths: {word!r} is not a number; write numbers with commas between: 0.5, 1.0"
            ) from None
        if not abs(value) <= MAX_STRENGTH:
            raise ValueError(f"strengths: {word} is not within -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}")
        found.append(value)
    if not 1 <= len(found) <= MAX_STRENGTHS:
        raise ValueError(f"strengths: give 1 to {MAX_STRENGTHS} numbers with commas between, there are {len(found)}")
    return list(dict.fromkeys(found))


def parse_prompts(text: str) -> list[str]:
    """The lines that are not empty.

    Raises:
        ValueError: there are none, or too many for one picture.
    """
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(found) <= MAX_PROMPTS:
        raise ValueError(f"prompts: give 1 to {MAX_PROMPTS} prompts, one per line, there are {len(found)}")
    return found


def chosen_lora(lora_name: str, lora: Mapping[str, Tensor] | None) -> tuple[str, dict[str, Tensor]]:
    """Title and tensors of the connected LoRA, else of the file.

    Raises:
        ValueError: there is neither.
    """
    if lora is not None:
        return "the connected LoRA", dict(lora)
    if lora_name == NONE:
        raise ValueError("there is no LoRA to compare: choose a file in lora_name, or connect lora")
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    return lora_name, comfy.utils.load_torch_file(path, safe_load=True)


def count_used(model: Any, tensors: Mapping[str, Tensor]) -> int:
    """How many tensors ComfyUI's loader will put on the model.

    Raises:
        ValueError: none.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False)
    fitting = [patch for target, patch in loaded.items() if _fits(model, target, patch)]
    if not fitting:
        first = next(iter(tensors), "no key at all")
        raise ValueError(
            f"none of the LoRA's {len(tensors)} tensors fit this model (the first is {first}): "
            "it was trained for another model; load that one"
        )
    return len(set().union(*(getattr(patch, "loaded_keys", ()) for patch in fitting)))


def _fits(model: Any, target: Any, patch: Any) -> bool:
    """Whether a LoRA has the shape of its weight, or of its slice of it.

    ComfyUI itself logs a misfit and goes on; the demo model's names are also the real one's.
    """
    if not isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        return True
    key, part = (target, None) if isinstance(target, str) else target[:2]
    shape = list(comfy.utils.get_attr(model.model, key).shape)
    if part is not None:
        shape[part[0]] = part[2]
    up, down = patch.weights[:2]
    return up.shape[0] == shape[0] and down[0].numel() == math.prod(shape[1:])


def apply_lora(model: Any, tensors: Mapping[str, Tensor], strength: float) -> Any:
    """The model as ComfyUI's own loaders return it."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]


class _Painter:
    """Pictures of prompts from models that differ in their LoRA only."""

    def __init__(self, clip: Any, vae: Any, width: int, height: int, steps: int, total: int) -> None:
        self._clip, self._vae, self._size, self._steps = clip, vae, (width, height), steps
        self._bar = comfy.utils.ProgressBar(total)
        self._prompts: dict[str, Any] = {}

    def draw(self, model: Any, texts: Sequence[str], seed: int) -> list[Tensor]:
        """A picture [3, H, W] of each text; the model is loaded once for all of them."""
        family = family_of(model)
        sigmas = family.sigmas(self._steps or default_steps(model), *self._size)
        conditions = [self._encode(text) for text in texts]
        blank = torch.zeros(1, *family.latent_shape(*self._size), device=comfy.model_management.intermediate_device())
        latents = []
        for row, condition in enumerate(conditions):
            latents.append(few_step_sample(model, condition, blank, (seed + row) % 2**64, sigmas, "euler"))
            self._bar.update(1)
        return [self._vae.decode(latent)[0].permute(2, 0, 1) for latent in latents]

    def _encode(self, text: str) -> Any:
        if text not in self._prompts:
            self._prompts[text] = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))
        return self._prompts[text]


def draw_grid(
    title: str, texts: Sequence[str], names: Sequence[str], columns: Sequence[Sequence[Tensor]]
) -> Image.Image:
    """A row per prompt, a column per variant."""
    rows = [Row(text, "", [column[i] for column in columns], names if i == 0 else ()) for i, text in enumerate(texts)]
    side = max(columns[0][0].shape[-2:])
    return contact_sheet(title, rows, tile=min(384, max(128, side)))
