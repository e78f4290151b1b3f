"""The node Compare LoRA: a grid of images, prompts against strengths, or against the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import node_helpers
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..dopsd_core.data.captions import check_prompts, put_trigger
from ..dopsd_core.data.triggers import require_names
from ..dopsd_core.image_grid import Row, contact_sheet, to_pixels
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import default_steps, send_text
from .comfy_host.embeddings import EMBEDDING, embeddings_fingerprint
from .comfy_host.families import family_of
from .comfy_host.fits import is_demo_model, require_vae
from .comfy_host.lora_columns import run_columns, strength_columns
from .comfy_host.lora_use import (
    NONE,
    chosen_lora,
    facts_of_lora,
    parse_strengths,
    stamp_of_choice,
)
from .comfy_host.model_patches import unused_schedule
from .comfy_host.paths import stamp_of
from .comfy_host.run_folders import loras_of_run
from .comfy_host.sampling import decode_image, few_step_sample
from .comfy_host.shared_inputs import sampling_steps_input, seed_input, size_inputs
from .comfy_host.sockets import CATEGORY

MAX_PROMPTS = 32


class CompareLoRA(io.ComfyNode):
    """A grid of images: one row per prompt, one column per strength or per step of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_CompareLoRA",
            display_name="Compare LoRA",
            category=CATEGORY,
            description="Draws every prompt without the LoRA and with it at each strength, or with each LoRA that a "
            "run kept along the way, from the same noise, in one labelled grid. ComfyUI's own loader applies the LoRA, "
            "so you see what you will get elsewhere.",
            search_aliases=["d-opsd", "lora grid", "xy plot", "test lora", "epochs", "checkpoints"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=_inputs(),
            outputs=[io.Image.Output(display_name="image", tooltip="The grid.")],
        )

    @classmethod
    def validate_inputs(
        cls, strengths: str | None = None, prompts: str | None = None, run_folder: str | None = None
    ) -> bool | str:
        """True, or what is wrong with strengths, prompts or the run."""
        try:
            if isinstance(strengths, str):  # else it comes over a link
                parse_strengths(strengths)
            if isinstance(prompts, str):
                parse_prompts(prompts)
            if isinstance(run_folder, str) and run_folder.strip():
                loras_of_run(run_folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str | None = NONE, prompts: str | None = "", run_folder: str | None = "", **others: Any
    ) -> Any:
        """Changes when a file or an embedding is replaced, so that ComfyUI runs the node again."""
        embeddings = embeddings_fingerprint() if prompts is None or EMBEDDING in prompts else ""  # None: over a link
        if run_folder is None or run_folder.strip():  # linked to a training, which ComfyUI knows the inputs of
            saves = loras_of_run(run_folder) if run_folder else []
            return (embeddings, tuple(stamp_of(saved.path) for saved in saves))
        stamp = stamp_of_choice(lora_name, "lora" in others)
        return (embeddings, stamp) if stamp == stamp else stamp  # a NaN stays one

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, prompts, strengths, seed, steps, width, height, lora_name, lora=None, reference=None,
        run_folder="",
    ) -> io.NodeOutput:  # fmt: skip
        """Draws the grid and shows which part of the LoRA fits the model."""
        texts, wanted = parse_prompts(prompts), parse_strengths(strengths)
        require_vae(vae, family_of(model), is_demo_model(model))
        if reference is not None:
            require_editing(model)
        if run_folder.strip():
            grid = run_columns(model, run_folder, wanted)
        else:
            grid = strength_columns(model, *chosen_lora(lora_name, lora, "compare"), wanted)
            grid = grid.named(facts_of_lora(lora_name, lora))
        require_names(texts, "prompt", grid.concepts)
        texts = [put_trigger(text, grid.trigger) for text in texts]
        notes = unused_inputs(model, lora_name, lora, reference, run_folder)
        send_text(cls, "\n".join((*grid.notes, *notes)))
        titles = ["untouched", *(column.title for column in grid.columns)]
        images = _ImageMaker(clip, vae, width, height, steps, len(texts) * len(titles), reference)
        columns = [images.draw(model, texts, seed), *(images.draw(c.with_lora(), texts, seed) for c in grid.columns)]
        image = to_pixels(draw_grid(f"{grid.name}, seed {seed}", texts, titles, columns))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model that the LoRA was trained for, without the LoRA."),
        io.Clip.Input("clip", tooltip="The model's text encoder."),
        io.Vae.Input("vae", tooltip="The model's VAE."),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="One prompt per line. Use some with the trigger word, for which [V] stands, and some without it: "
            "those should not change.",
        ),
        io.String.Input(
            "strengths",
            default="1.0",
            optional=True,
            tooltip="Strengths of the LoRA, separated by commas: 0.5, 1.0, 1.5.",
        ),
        seed_input("Noise of the first prompt; each further prompt uses the next seed. All images of a row share it."),
        sampling_steps_input(),
        *size_inputs(64, 4096, "{side} of each image in pixels; 64 for the demo model."),
        io.Combo.Input(
            "lora_name",
            options=[NONE, *folder_paths.get_filename_list("loras")],
            default=NONE,
            optional=True,
            tooltip="A LoRA file. Not read when a lora is connected.",
        ),
        io.LoraModel.Input("lora", optional=True, tooltip="A LoRA from D-OPSD Train LoRA, without saving it first."),
        io.Image.Input(
            "reference",
            optional=True,
            tooltip="For edit LoRAs (FLUX.2-klein): the image that the prompts edit. It is cropped to width "
            "and height.",
        ),
        io.String.Input(
            "run_folder",
            default="",
            optional=True,
            tooltip="run_folder of D-OPSD Train LoRA, or the name of a run in output/dopsd: one column per LoRA that "
            "save_every kept, by step. Replaces lora and lora_name. Empty: one column per strength.",
        ),
    ]


def parse_prompts(text: str) -> list[str]:
    """The lines that are not empty.

    Raises:
        ValueError: there are none, too many for one grid, or one contains invalid characters.
    """
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(found) <= MAX_PROMPTS:
        raise ValueError(f"prompts: give 1 to {MAX_PROMPTS} prompts, one per line, there are {len(found)}")
    check_prompts(found, "prompts: line")
    return found


def unused_inputs(
    model: Any, lora_name: str, lora: Mapping[str, Tensor] | None, reference: Tensor | None, run_folder: str = ""
) -> tuple[str, ...]:
    """One line for each input of Compare LoRA that is not used; reference [n, H, W, 3]."""
    notes = list(unused_schedule(model))
    if run_folder.strip() and lora is not None:
        notes.append("the connected lora is not used: run_folder is given")
    if run_folder.strip() and lora_name != NONE:
        notes.append(f"lora_name {lora_name} is not read: run_folder is given")
    elif lora is not None and lora_name != NONE:
        notes.append(f"lora_name {lora_name} is not read: a lora is connected")
    if reference is not None and len(reference) > 1:
        notes.append(f"of {len(reference)} reference images only the first is used")
    return tuple(notes)


class _ImageMaker:
    """Images of prompts from models that differ in their LoRA only.

    Args:
        width: of an image, in pixels.
        height: of an image, in pixels.
        steps: sampling steps; 0 for the model's own number.
        total: how many images will be drawn, for the progress bar.
        reference: [n, H, W, 3] in [0, 1]; the first is edited. None to draw from noise alone.
    """

    def __init__(
        self, clip: Any, vae: Any, width: int, height: int, steps: int, total: int, reference: Tensor | None
    ) -> None:
        self._clip, self._vae, self._size, self._steps = clip, vae, (width, height), steps
        self._bar = comfy.utils.ProgressBar(total)
        self._references = [] if reference is None else [vae.encode(cropped(reference[:1], width, height))]
        self._prompts: dict[str, Any] = {}

    def draw(self, model: Any, texts: Sequence[str], seed: int) -> list[Tensor]:
        """One image [3, H, W] in [0, 1] per text; the model is loaded once for all of them."""
        family = family_of(model)
        sigmas = family.sigmas(self._steps or default_steps(model), *self._size)
        conditions = [self._encode(text) for text in texts]
        blank = torch.zeros(1, *family.latent_shape(*self._size), device=comfy.model_management.intermediate_device())
        latents = []
        for row, condition in enumerate(conditions):
            latents.append(few_step_sample(model, condition, blank, (seed + row) % 2**64, sigmas, "euler"))
            self._bar.update(1)
        return [decode_image(self._vae, latent).permute(2, 0, 1) for latent in latents]

    def _encode(self, text: str) -> Any:
        if text not in self._prompts:
            encoded = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))
            if self._references:
                encoded = node_helpers.conditioning_set_values(encoded, {"reference_latents": self._references})
            self._prompts[text] = encoded
        return self._prompts[text]


def require_editing(model: Any) -> None:
    """Raises ValueError when the MODEL has no editing branch."""
    family = family_of(model)
    if "edit" not in family.teachers:
        raise ValueError(f"{family.title} cannot edit images: disconnect reference")


def cropped(image: Tensor, width: int, height: int) -> Tensor:
    """Image [n, H, W, 3] -> [n, height, width, 3]: scaled and center-cropped, as training crops source images."""
    return comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "bicubic", "center").movedim(1, -1)


def draw_grid(
    title: str, texts: Sequence[str], names: Sequence[str], columns: Sequence[Sequence[Tensor]]
) -> Image.Image:
    """The labelled grid: a row per prompt, a column per variant.

    Args:
        names: of the columns.
        columns: images [3, H, W] in [0, 1], one per text.
    """
    rows = [Row(text, "", [column[i] for column in columns], names if i == 0 else ()) for i, text in enumerate(texts)]
    side = max(columns[0][0].shape[-2:])
    return contact_sheet(title, rows, tile=min(384, max(128, side)))
