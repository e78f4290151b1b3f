"""The arguments of `python -m dopsd_core caption`. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.captioning import CaptionOptions
from ..option_arguments import add_option, given_values
from ..options import all_options


def caption_options_from_args(args: argparse.Namespace) -> CaptionOptions:
    """The options of `caption`.

    Raises:
        ConfigError: values are invalid; the message lists every problem.
    """
    return CaptionOptions(**given_values(args, all_options(CaptionOptions)))


def add_caption(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "caption",
        allow_abbrev=False,
        help="write missing captions, and point out words that stand for the concept",
        description="Writes a .txt caption beside each image that has none, with a vision-language model: it says [V] "
        "for the concept and not what makes the concept itself. Captions that are there are never changed. Lists all "
        "images with their captions, and the words that nearly all captions share or that describe the concept. The "
        "exit code is 1 if an image has no caption afterwards.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images, with its subfolders")
    parser.add_argument("--check", action="store_true", help="only list and check, without a model; writes no caption")
    parser.add_argument(
        "--vlm", default="Qwen/Qwen3-VL-4B-Instruct", metavar="MODEL",
        help="folder or Hugging Face id of a Qwen3-VL in transformers' layout (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--download", action="store_true", help="download the model if it is not on this machine")
    parser.add_argument(
        "--device", default="auto", metavar="NAME",
        help="such as cuda, cuda:1 or cpu; auto is the GPU if there is one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw images and captions into this PNG")
    group = parser.add_argument_group("what captions say")
    for option in all_options(CaptionOptions):
        add_option(group, option)
