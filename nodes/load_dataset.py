"""Load Dataset: a folder, or what ComfyUI's own data set nodes hand over, checked and shown."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..dopsd_core.data.captions import CaptionError, check_text
from ..dopsd_core.data.dataset import DatasetReport, read_dataset
from ..dopsd_core.data.images import pixel_digest
from ..dopsd_core.data.repeats import MAX_REPEATS
from ..dopsd_core.image_grid import thumbnails, to_images, to_pixels
from ..dopsd_core.text import printable
from .comfy_host.checked_inputs import checked
from .comfy_host.denoiser import send_text
from .comfy_host.paths import (
    DEMO,
    allowed_root,
    dataset_choices,
    dataset_fingerprint,
    locate_dataset,
    resolve_dataset,
    store_dataset,
)
from .comfy_host.sockets import CATEGORY, Dataset, DatasetSocket

MULTIPLE = 16
_SHOWN_LINES = 12


class LoadDataset(io.ComfyNode):
    """A data set, checked, with its problems named."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DOPSD_LoadDataset",
            display_name="Load Dataset (D-OPSD)",
            category=CATEGORY,
            description="Reads pictures and captions, checks every file, and shows what is wrong with them before any "
            "time is spent on training.",
            search_aliases=["d-opsd", "training data", "captions", "load images and texts"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=dataset_choices(),
                    tooltip="A folder in ComfyUI's input folder with pictures, each with a .txt of the same name that "
                    "holds its caption; or a .jsonl file with a row per picture. For edits: a folder with target and "
                    "source in it, a result and its instruction in the one, what it starts from under the same name in "
                    "the other. The owner of this ComfyUI can allow "
                    "more folders under dopsd_datasets in extra_model_paths.yaml. Not read when images are connected.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=2048,
                    step=16,
                    optional=True,
                    tooltip="Side of a square training picture. Other shapes get as many pixels: 1024 also means "
                    "1152x896. Lower needs less memory and time. The demo model's pictures are 64.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    optional=True,
                    tooltip="The word for your concept; it replaces [V] in the captions. Choose one that means nothing "
                    "yet, such as ohwx. Empty: [V] stays as it is.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=MAX_REPEATS,
                    optional=True,
                    tooltip="Visits per epoch of each picture. It multiplies what a folder named 10_anything or the "
                    "rows of a .jsonl ask for.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the visits at which the caption is left empty. 0 is right for a concept with a "
                    "trigger word; a style gains from 0.1.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures from ComfyUI's own nodes, instead of the folder. Connect texts too.",
                ),
                io.String.Input(
                    "texts",
                    optional=True,
                    force_input=True,
                    tooltip="Captions of the connected images: as many, in the same order.",
                ),
            ],
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="For Build Teacher Condition."),
                io.String.Output(display_name="report", tooltip="What was found, in words."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None) -> bool | str:
        choice = _first(folder)
        try:
            if choice not in (None, DEMO):
                locate_dataset(choice)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: Any = None, **_: Any) -> str | None:
        choice = _first(folder)
        return choice and dataset_fingerprint(choice)

    @classmethod
    @checked
    def execute(
        cls,
        folder: list[str],
        resolution: list[int],
        trigger: list[str],
        repeats: list[int],
        caption_dropout: list[float],
        images: list[Tensor] | None = None,
        texts: list[str] | None = None,
    ) -> io.NodeOutput:
        source, note = _source(folder[0], images, texts)
        report = read_dataset(
            source,
            pixel_budget=resolution[0] ** 2,
            multiple=MULTIPLE,
            trigger=trigger[0],
            repeats=repeats[0],
            root=allowed_root(source),
            progress=_progress(),
        )
        send_text(cls, note + shortened(without_folder(report.describe(), report)))
        refuse_errors(report)
        dataset = Dataset(report, trigger[0].strip(), caption_dropout[0])
        pixels = to_pixels(draw_report(report))
        return io.NodeOutput(dataset, note + report.describe(), ui=ui.PreviewImage(pixels, cls=cls))


def _source(choice: str, images: list[Tensor] | None, texts: list[str] | None) -> tuple[Path, str]:
    """Where the data is, and a line that names the choice of a folder that is not read."""
    if images is None and texts is None:
        return resolve_dataset(choice), ""
    note = "" if choice == DEMO else f"the folder {choice} is not read: images are connected\n"
    return store_pictures(images or [], texts or []), note


def store_pictures(images: Sequence[Tensor], texts: Sequence[str]) -> Path:
    """Images [n, H, W, 3 or 4] and their captions as a folder like any other, the same one for the same pictures.

    A pair that comes several times (ComfyUI's reader repeats those of a folder named 10_anything) becomes one with
    repeats.

    Raises:
        ValueError: there are not as many texts as images, one is no text, or a pair comes more than MAX_REPEATS times.
    """
    pictures = [picture for batch in images for picture in to_images(batch.permute(0, 3, 1, 2))]
    texts = [text.removeprefix("\ufeff") for text in texts]  # which a file may begin with, read by another node
    if len(pictures) != len(texts):
        raise ValueError(
            f"{len(pictures)} images and {len(texts)} texts are connected to Load Dataset; give one text for each image"
        )
    visits: dict[tuple[str, str], list[int]] = {}
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        _check_connected(index + 1, text)
        visits.setdefault((pixel_digest(picture), text), []).append(index)
    most = max(visits.values(), key=len, default=[])
    if len(most) > MAX_REPEATS:
        raise ValueError(
            f"image {most[0] + 1} comes {len(most)} times with the same text, and at most {MAX_REPEATS} are allowed: "
            "was a year in its folder's name taken for a count? Rename that folder"
        )
    digest = hashlib.sha256(repr([(pair, len(where)) for pair, where in visits.items()]).encode()).hexdigest()

    def write(folder: Path) -> None:
        for (_, text), where in visits.items():
            _write_pair(folder, where, pictures[where[0]], text)

    return store_dataset(f"dopsd-dataset-{digest[:16]}", write)


def _check_connected(number: int, text: str) -> None:
    try:
        check_text(text)
    except CaptionError as error:
        raise ValueError(f"text {number} of those connected to Load Dataset cannot be used: {error}") from error


def _write_pair(folder: Path, where: Sequence[int], picture: Image.Image, text: str) -> None:
    place = folder / f"{len(where)}_times" if len(where) > 1 else folder
    place.mkdir(exist_ok=True)
    picture.save(place / f"image_{where[0] + 1:04d}.png", compress_level=1)
    (place / f"image_{where[0] + 1:04d}.txt").write_bytes(text.encode())


def draw_report(report: DatasetReport) -> Image.Image:
    """Thumbnails with captions, an edit's sources beside its target, and the problems under them."""
    items = [((*pair.source_images, pair.image_path), pair.captions[0]) for pair in report.pairs]
    problems = "\n".join(str(problem) for problem in (*report.errors, *report.warnings))
    return thumbnails(items, without_folder(problems, report))


def refuse_errors(report: DatasetReport) -> None:
    """Raises for errors; the first one comes first, because ComfyUI's page shows the first line alone.

    Raises:
        ValueError: every error, if there is one.
    """
    if report.errors:
        more = len(report.errors) - 1
        others = f" (and {more} more error{'s' * (more > 1)}: see the node's text or the log)" if more else ""
        lines = [without_folder(str(error), report) for error in report.errors]
        raise ValueError(printable("\n".join([lines[0] + others, *lines[1:], f"the data set is {report.source}"])))


def without_folder(text: str, report: DatasetReport) -> str:
    """File names relative to the data set: a node is narrow."""
    folder = report.source if report.source.is_dir() else report.source.parent
    whole, name = printable(str(folder)), printable(folder.name)
    return text.replace(f"{whole}{os.sep}", "").replace(f"{whole}:", f"{name}:")


def shortened(text: str) -> str:
    """The first lines of a report, and how many there are besides."""
    lines = text.splitlines()
    if len(lines) <= _SHOWN_LINES:
        return text
    return "\n".join([*lines[: _SHOWN_LINES - 2], f"and {len(lines) - _SHOWN_LINES + 1} more lines", lines[-1]])


def _progress() -> Callable[[int, int], None]:
    """Moves the node's bar; stops here when the user has cancelled."""
    bars: dict[int, Any] = {}

    def told(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bars.setdefault(total, comfy.utils.ProgressBar(total)).update_absolute(done, total)

    return told


def _first(value: Any) -> Any:
    """The value of an input that comes in a list, None for one that is connected."""
    return value[0] if isinstance(value, list | tuple) and value else None
