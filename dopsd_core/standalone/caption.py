"""The command caption: writes the missing captions of a folder with a vision-language model of transformers."""

from __future__ import annotations

import argparse
import io

import torch
from torch import Tensor
from tqdm import tqdm

from ..caption_sheet import caption_sheet
from ..conditioning.seen_size import MAX_PIXELS, MIN_PIXELS, seen_size
from ..data.caption_folder import caption_folder
from ..data.captioning import Ask, CaptionOptions
from ..demo.model_files import resize_for_vision
from ..files.atomic import write_atomic
from ..metrics.needs import Needs
from ..metrics.vlm import TransformersVlm
from .texts import say

CAPTIONS = Needs("captioning", "transformers torchvision", "Qwen/Qwen3-VL-4B-Instruct")


def run_caption(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 1 if an image has no caption afterwards.

    Raises:
        ValueError: an option or the folder is not valid, or packages or weights are missing.
        OSError: a caption cannot be written.
    """
    options: CaptionOptions = args.caption_options
    ask = None if args.check else _ask_with(args, options)
    with tqdm(unit="image", disable=args.check) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = caption_folder(args.folder, options, ask, progress=show)
    say(found.describe())
    if args.sheet is not None:
        drawn = io.BytesIO()
        caption_sheet(found).save(drawn, format="PNG")
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.sheet, drawn.getvalue())
        say(str(args.sheet))
    return int(any(not item.caption for item in found.items))


def _ask_with(args: argparse.Namespace, options: CaptionOptions) -> Ask:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    model = TransformersVlm.load(
        args.vlm, device, args.download, needs=CAPTIONS, max_new_tokens=options.max_tokens
    )  # fmt: skip

    def ask(image: Tensor, question: str) -> str:
        size = seen_size(image.shape[1], image.shape[2], MIN_PIXELS, MAX_PIXELS)
        return model([resize_for_vision(image, size)], question)

    return ask
