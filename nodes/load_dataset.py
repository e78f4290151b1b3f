"""The node Load Dataset: a folder, or images and texts from ComfyUI's own dataset nodes, checked and shown."""

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
from ..dopsd_core.data.resolutions import parse_resolutions, scales_of, smaller_budgets
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
    never_the_same,
    resolve_dataset,
    store_dataset,
)
from .comfy_host.sockets import CATEGORY, Dataset, DatasetSocket

MULTIPLE = 16
_SHOWN_LINES, _NOTED = 12, 20
_OVERSHOOT = 0.5
"""How far values of connected images may leave 0..1, as sharp resizing does; they are clamped."""


class LoadDataset(io.ComfyNode):
    """Reads a dataset, checks every file and lists the problems."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="DOPSD_LoadDataset",
            display_name="Load Dataset (D-OPSD)",
            category=CATEGORY,
            description="Reads images and captions, checks every file, and lists all problems before any time is spent "
            "on training.",
            search_aliases=["d-opsd", "training data", "captions", "load images and texts"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=_inputs(),
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="For Build Teacher Condition."),
                io.String.Output(display_name="report", tooltip="What was found, as text."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None) -> bool | str:
        """True, or why the folder cannot be read."""
        choice = _first(folder)
        try:
            if choice not in (None, DEMO):
                locate_dataset(choice)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: Any = None, **_: Any) -> Any:
        """Changes when a file of the dataset changes, so that ComfyUI runs the node again."""
        choice = _first(folder)
        return never_the_same() if choice is None else dataset_fingerprint(choice)

    @classmethod
    @checked
    def execute(
        cls, folder, resolution, trigger, repeats, caption_dropout, resolutions, images=None, texts=None
    ) -> io.NodeOutput:
        """Reads and checks the dataset; `images` are [n, H, W, 3 or 4] in [0, 1]. Every input is a list."""
        settings = {"resolution": resolution, "trigger": trigger, "repeats": repeats}
        single: dict[str, Any] = {name: only(name, values) for name, values in settings.items()}
        several = parse_resolutions(only("resolutions", resolutions), MULTIPLE)
        if several:
            single["resolution"] = several[-1].side
        source, note = _source(only("folder", folder), images, texts)
        report = _read(source, smaller_budgets(several), **single)
        send_text(cls, note + shortened(without_folder(report.describe(), report)))
        refuse_errors(report)
        scales, remarks = scales_of(report, several, MULTIPLE)
        notes = (*note.splitlines(), *noted(report), *remarks)
        trigger, dropout = report.trigger_in_prompts(single["trigger"]), only("caption_dropout", caption_dropout)
        dataset = Dataset(report, trigger, dropout, notes, scales)
        pixels = to_pixels(draw_report(report))
        return io.NodeOutput(dataset, note + report.describe(), ui=ui.PreviewImage(pixels, cls=cls))


def only(name: str, values: Sequence[Any]) -> Any:
    """The value of the input `name`, which ComfyUI gives as a list.

    Raises:
        ValueError: there is none, or there are different ones, of which all but one would not be used.
    """
    if not values or any(value != values[0] for value in values):
        count = f"{len(values)} values" if values else "no value"
        raise ValueError(f"{name} of Load Dataset has {count}: connect one value, not a list")
    return values[0]


def _read(source: Path, smaller: Sequence[int], resolution: int, trigger: str, repeats: int) -> DatasetReport:
    return read_dataset(
        source,
        pixel_budget=resolution**2,
        multiple=MULTIPLE,
        trigger=trigger,
        repeats=repeats,
        root=allowed_root(source),
        progress=_progress(),
        smaller_budgets=smaller,
    )


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "folder",
            options=dataset_choices(),
            tooltip="A folder in ComfyUI's input folder with images, each with a .txt file of the same name "
            "for its caption; or a .jsonl file with one row per image. For edits: a folder with the "
            "subfolders target (the results and their instructions) and source (the images before the edit, "
            "under the same names). The owner of this ComfyUI can allow more folders under dopsd_datasets in "
            "extra_model_paths.yaml. Not read when images are connected.",
        ),
        io.Int.Input(
            "resolution",
            default=1024,
            min=64,
            max=2048,
            step=16,
            optional=True,
            tooltip="Side of a square training image in pixels. Other aspect ratios get the same number of "
            "pixels: 1024 also means 1152x896. Lower needs less memory and time. 64 for the demo model.",
        ),
        io.String.Input(
            "trigger",
            default="",
            optional=True,
            tooltip="The word for your concept; it replaces [V] in the captions. Choose one without a meaning, "
            "such as ohwx. Empty: [V] stays as it is. For several concepts, put a file trigger.txt with "
            "the word into the subfolder of each.",
        ),
        io.Int.Input(
            "repeats",
            default=1,
            min=1,
            max=MAX_REPEATS,
            optional=True,
            tooltip="How often each image is used per epoch. Multiplies the repeats of a folder named "
            "10_anything and of the rows of a .jsonl file.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Share of training samples with an empty caption. Use 0 for a concept with a trigger word; "
            "0.1 helps for a style.",
        ),
        *_later_inputs(),
    ]


def _later_inputs() -> list[Any]:
    return [
        io.Image.Input(
            "images",
            optional=True,
            tooltip="Images from ComfyUI's own nodes, used instead of the folder. Connect texts too.",
        ),
        io.String.Input(
            "texts",
            optional=True,
            force_input=True,
            tooltip="Captions of the connected images: the same number, in the same order.",
        ),
        io.String.Input(
            "resolutions",
            default="",
            optional=True,
            advanced=True,
            tooltip="Several resolutions in one run, in place of resolution: 512:2, 768, 1024 are drawn by share, half "
            "of the batches at 512. Images are not trained at one that they would be upsampled to. small_first of "
            "Training Settings begins with the smaller ones, which need less time.",
        ),
    ]


def _source(choice: str, images: list[Tensor] | None, texts: list[str] | None) -> tuple[Path, str]:
    """Where the data is, and a line that names the folder if it is not read."""
    if images is None and texts is None:
        return resolve_dataset(choice), ""
    note = "" if choice == DEMO else f"the folder {choice} is not read: images are connected\n"
    return store_images(images or [], texts or []), note


def store_images(images: Sequence[Tensor], texts: Sequence[str]) -> Path:
    """Writes images [n, H, W, 3 or 4] in [0, 1] and their captions as a dataset folder; the same one for equal data.

    A pair that occurs several times (ComfyUI's reader repeats those of a folder named 10_anything) becomes one pair
    with repeats.

    Raises:
        ValueError: images or a text are not valid, there are not as many texts as images, or a pair occurs too often.
    """
    for number, batch in enumerate(images, 1):
        _check_batch(number, batch)
    single = [image for batch in images for image in to_images(batch.permute(0, 3, 1, 2))]
    texts = [text.removeprefix("\ufeff") for text in texts]  # a byte order mark that another node has kept
    if len(single) != len(texts):
        raise ValueError(
            f"{len(single)} images and {len(texts)} texts are connected to Load Dataset; give one text for each image"
        )
    visits: dict[tuple[str, str], list[int]] = {}
    for index, (image, text) in enumerate(zip(single, texts, strict=True)):
        _check_connected(index + 1, text)
        visits.setdefault((pixel_digest(image), text), []).append(index)
    most = max(visits.values(), key=len, default=[])
    if len(most) > MAX_REPEATS:
        raise ValueError(
            f"image {most[0] + 1} occurs {len(most)} times with the same text, and at most {MAX_REPEATS} are allowed: "
            "if a year in its folder's name was read as a count, rename that folder"
        )
    digest = hashlib.sha256(repr([(pair, len(where)) for pair, where in visits.items()]).encode()).hexdigest()

    def write(folder: Path) -> None:
        for (_, text), where in visits.items():
            _write_pair(folder, where, single[where[0]], text)

    return store_dataset(f"dopsd-dataset-{digest[:16]}", write)


def _check_batch(number: int, batch: Tensor) -> None:
    where = f"images {number} of those connected to Load Dataset"
    if batch.ndim != 4 or batch.shape[-1] not in (3, 4):
        raise ValueError(
            f"{where} have the shape {list(batch.shape)}, it must be [n, H, W, 3 or 4]: connect RGB images"
        )
    low, high = (float(value) for value in batch.aminmax()) if batch.numel() else (0.0, 0.0)
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        raise ValueError(
            f"{where} have values from {low:g} to {high:g}, they must be within 0 and 1: correct the node that makes "
            "them, such as a VAE Decode in too narrow a dtype"
        )


def _check_connected(number: int, text: str) -> None:
    try:
        check_text(text)
    except CaptionError as error:
        raise ValueError(f"text {number} of those connected to Load Dataset cannot be used: {error}") from error


def _write_pair(folder: Path, where: Sequence[int], image: Image.Image, text: str) -> None:
    place = folder / f"{len(where)}_times" if len(where) > 1 else folder
    place.mkdir(exist_ok=True)
    image.save(place / f"image_{where[0] + 1:04d}.png", compress_level=1)
    (place / f"image_{where[0] + 1:04d}.txt").write_bytes(text.encode())


def draw_report(report: DatasetReport) -> Image.Image:
    """Thumbnails with captions, an edit's source images beside its target, and the problems below them."""
    items = [((*pair.source_images, pair.image_path), pair.captions[0]) for pair in report.pairs]
    problems = "\n".join(str(problem) for problem in (*report.errors, *report.warnings))
    return thumbnails(items, without_folder(problems, report))


def refuse_errors(report: DatasetReport) -> None:
    """Stops if the report has errors. The first error is the first line, since ComfyUI's page shows only that.

    Raises:
        ValueError: with every error.
    """
    if report.errors:
        more = len(report.errors) - 1
        others = f" (and {more} more error{'s' * (more > 1)}: see the node's text or the log)" if more else ""
        lines = [without_folder(str(error), report) for error in report.errors]
        raise ValueError(printable("\n".join([lines[0] + others, *lines[1:], f"the dataset is {report.source}"])))


def without_folder(text: str, report: DatasetReport) -> str:
    """The text with file names relative to the dataset, since a node is narrow."""
    folder = report.source if report.source.is_dir() else report.source.parent
    whole, name = printable(str(folder)), printable(folder.name)
    return text.replace(f"{whole}{os.sep}", "").replace(f"{whole}:", f"{name}:")


def noted(report: DatasetReport) -> tuple[str, ...]:
    """The warnings for the report of a run, the first ones if there are many."""
    lines = [without_folder(str(problem), report) for problem in report.warnings]
    more = len(lines) - _NOTED
    return (*lines[:_NOTED], *([f"{more} more warnings of the dataset: see Load Dataset"] if more > 0 else []))


def shortened(text: str) -> str:
    """The first lines of a report, and how many lines are left out."""
    lines = text.splitlines()
    if len(lines) <= _SHOWN_LINES:
        return text
    return "\n".join([*lines[: _SHOWN_LINES - 2], f"and {len(lines) - _SHOWN_LINES + 1} more lines", lines[-1]])


def _progress() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the node's progress bar and stops when the user has cancelled."""
    bars: dict[int, Any] = {}

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bars.setdefault(total, comfy.utils.ProgressBar(total)).update_absolute(done, total)

    return show


def _first(value: Any) -> Any:
    """The value of an input that comes in a list, None for one that is connected."""
    return value[0] if isinstance(value, list | tuple) and value else None
