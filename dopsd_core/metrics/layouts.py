"""Images in the layout that the scorers of GenEval and DPG-Bench read, from their own prompt files.

    geneval   evaluation_metadata.jsonl; per prompt a folder 00000/ with metadata.jsonl and samples/00000.png ...
    dpg       a folder of <item>.txt, one prompt each; per prompt an image <item>.png, a grid of 2 x 2 images

Images that are there already are not drawn again, so an interrupted command resumes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from ..data.captions import read_caption_file
from ..files.atomic import write_atomic
from ..image_grid import to_images
from .protocol import seed_of

Layout = Literal["geneval", "dpg"]

IMAGES_PER_PROMPT = 4
"""As both benchmarks ask for."""

Draw = Callable[[str, Sequence[int]], Sequence[Tensor]]
"""(prompt, one seed per image) -> images [3, H, W] in [0, 1]."""


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt of a benchmark.

    Attributes:
        text: the prompt.
        place: name of its folder or image.
        record: the line of the prompt file that the scorer reads beside the images; "" if it reads none.
    """

    text: str
    place: str
    record: str = ""


def read_prompts(layout: Layout, source: Path) -> list[BenchmarkPrompt]:
    """The prompts of GenEval's evaluation_metadata.jsonl, or of DPG-Bench's folder of .txt files.

    Raises:
        ValueError: the file or folder is not what the benchmark ships.
        OSError: it cannot be read.
    """
    found = _geneval_prompts(source) if layout == "geneval" else _dpg_prompts(source)
    if not found:
        wanted = "evaluation_metadata.jsonl of GenEval" if layout == "geneval" else "prompts folder of DPG-Bench"
        raise ValueError(f"{source} has no prompts; give the {wanted}")
    return found


def _geneval_prompts(source: Path) -> list[BenchmarkPrompt]:
    found = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{source}, line {number}: not a JSON object with a prompt, as GenEval ships them"
            ) from error
        found.append(BenchmarkPrompt(str(text), f"{len(found):05}", line.strip()))
    return found


def _dpg_prompts(source: Path) -> list[BenchmarkPrompt]:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder of .txt prompts of DPG-Bench")
    files = sorted(source.glob("*.txt"))
    return [BenchmarkPrompt(read_caption_file(file).strip(), file.stem) for file in files]


def write_layout(
    layout: Layout,
    prompts: Sequence[BenchmarkPrompt],
    draw: Draw,
    output: Path,
    seed: int = 0,
    on_prompt: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Draws `IMAGES_PER_PROMPT` images per prompt and writes them as the benchmark's scorer reads them.

    Args:
        seed: of the evaluation; each image has its own, a function of the prompt's number and its own.
        on_prompt: called with the number of prompts that are done, and of all.
    """
    for number, prompt in enumerate(prompts):
        files = _files(layout, output, prompt)
        if not all(file.exists() for file in files):
            seeds = [seed_of(seed, number, index) for index in range(IMAGES_PER_PROMPT)]
            images = to_images(draw(prompt.text, seeds))
            for file, image in zip(files, images if layout == "geneval" else [_square(images)], strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                _save(image, file)
        if prompt.record:
            write_atomic(output / prompt.place / "metadata.jsonl", prompt.record.encode())
        on_prompt(number + 1, len(prompts))


def _files(layout: Layout, output: Path, prompt: BenchmarkPrompt) -> list[Path]:
    if layout == "dpg":
        return [output / f"{prompt.place}.png"]
    return [output / prompt.place / "samples" / f"{index:05}.png" for index in range(IMAGES_PER_PROMPT)]


def _square(images: Sequence[Image.Image]) -> Image.Image:
    """Four images of equal size as a grid of two by two, row by row."""
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % 2 * width, index // 2 * height))
    return grid


def _save(image: Image.Image, file: Path) -> None:
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_atomic(file, data.getvalue())
