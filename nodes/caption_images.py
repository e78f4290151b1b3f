"""The node Caption Images: missing captions from Qwen3-VL, and what captions say of the concept itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy_api.latest import io, ui
from torch import Tensor

from ..dopsd_core.caption_sheet import caption_sheet
from ..dopsd_core.conditioning.seen_size import MAX_PIXELS, MIN_PIXELS, seen_size
from ..dopsd_core.data.caption_folder import caption_folder
from ..dopsd_core.data.captioning import Ask, CaptionOptions
from ..dopsd_core.data.folder import ROW_SUFFIXES
from ..dopsd_core.demo.model_files import resize_for_vision
from ..dopsd_core.image_grid import to_pixels
from ..dopsd_core.options import all_options
from .comfy_host.checked_inputs import checked
from .comfy_host.clip_answers import answer, can_answer
from .comfy_host.denoiser import send_text
from .comfy_host.option_inputs import option_inputs, option_values
from .comfy_host.paths import (
    DEMO,
    allowed_root,
    dataset_choices,
    dataset_fingerprint,
    locate_dataset,
    never_the_same,
    resolve_dataset,
)
from .comfy_host.sockets import CATEGORY

_OPTIONS = tuple(all_options(CaptionOptions))
_SHOWN_LINES = 12


class CaptionImages(io.ComfyNode):
    """Writes missing captions, never changes others, and lists all of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_CaptionImages",
            display_name="Caption Images",
            category=CATEGORY,
            description="Writes a .txt caption beside each image that has none: it says [V] for the concept, and not "
            "what makes the concept itself. Captions that are there are never changed. Lists all of them, and points "
            "out words that take over what [V] should learn.",
            search_aliases=["d-opsd", "auto caption", "qwen3-vl", "tag images"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Image.Output(display_name="image", tooltip="All images with state and caption, to look through."),
                io.String.Output(display_name="report", tooltip="The same as text, with everything to look at."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None) -> bool | str:
        """True, or why captions cannot be written there."""
        try:
            if folder not in (None, DEMO) and locate_dataset(folder).suffix.lower() in ROW_SUFFIXES:
                return f"{folder} is no folder: captions are written beside images, so choose the images' folder"
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: Any = None, **_: Any) -> Any:
        """Changes when an image or caption changes, so that ComfyUI runs the node again."""
        return never_the_same() if folder is None else dataset_fingerprint(folder)

    @classmethod
    @checked
    def execute(cls, folder, clip=None, **widgets: Any) -> io.NodeOutput:
        """Writes what is missing, and shows all captions; without `clip` it only lists and checks."""
        options = CaptionOptions(**option_values(_OPTIONS, widgets))
        source = resolve_dataset(folder)
        ask = None if clip is None else _ask_with(clip, options)
        found = caption_folder(source, options, ask, root=allowed_root(source), progress=_progress(cls))
        send_text(cls, _shortened(found.describe().replace(str(source), source.name, 1)))
        image = to_pixels(caption_sheet(found))
        return io.NodeOutput(image, found.describe(), ui=ui.PreviewImage(image, cls=cls))


def _shortened(text: str) -> str:
    """The first lines of a text, and how many follow."""
    lines = text.splitlines()
    more = [f"and {len(lines) - _SHOWN_LINES} more lines: see report"] if len(lines) > _SHOWN_LINES else []
    return "\n".join([*lines[:_SHOWN_LINES], *more])


def _ask_with(clip: Any, options: CaptionOptions) -> Ask:
    """Questions to the CLIP about one image.

    Raises:
        ValueError: it cannot answer.
    """
    if not can_answer(clip, 1):
        raise ValueError(
            "the CLIP connected to Caption Images cannot write about images: load qwen3vl_4b or qwen3vl_8b with Load "
            "CLIP, of any type but flux2, or disconnect clip to only check the captions"
        )

    def ask(image: Tensor, question: str) -> str:
        size = seen_size(image.shape[1], image.shape[2], MIN_PIXELS, MAX_PIXELS)
        return answer(clip, [resize_for_vision(image, size).clamp(0, 1)], question, options.max_tokens)

    return ask


def _progress(node: Any) -> Callable[[int, int], None]:
    """A callback (done, total) that shows which caption is being written; it stops when the user has cancelled."""

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        send_text(node, f"caption {min(done + 1, total)} of {total}")

    return show


def _inputs() -> list[Any]:
    folders = [choice for choice in dataset_choices() if not choice.lower().endswith(ROW_SUFFIXES)]
    return [
        io.Combo.Input(
            "folder",
            options=folders,
            tooltip="A folder of images in ComfyUI's input folder, or one that its owner allows, with its subfolders. "
            "Captions are written there. Choose the same one in Load Dataset afterwards.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="Qwen3-VL, which writes the captions: qwen3vl_4b or qwen3vl_8b from Load CLIP, of any type but "
            "flux2. The text encoder of Krea 2 is one. Not connected: nothing is written, the captions are only listed "
            "and checked.",
        ),
        *option_inputs(_OPTIONS),
    ]
