"""The arguments of `python -m dopsd_core encode`; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..number_text import int_argument
from .model_options import add_model_arguments

SHARD_SIZE = 64


def add_encode(commands: Any, add_teacher: Any) -> None:
    """Adds the command to the subparsers of `python -m dopsd_core`; add_teacher: adds the options of the teacher."""
    parser = commands.add_parser(
        "encode",
        allow_abbrev=False,
        help="encode a large dataset into shards that train streams",
        description="Writes the conditions of student and teacher and the latents of a dataset as safetensors shards "
        "with a JSON index; then train takes the folder of --output in place of the dataset. On several GPUs: "
        "accelerate launch -m dopsd_core encode ...; the processes share the shards. After an interruption the same "
        "command continues with the shards that are missing.",
    )
    parser.add_argument(
        "dataset", metavar="DATASET",
        help="folder of images and captions, .jsonl file, WebDataset .tar or folder of them, or hf:NAME for a Hugging "
        "Face dataset on the hub (streamed) or in a folder (hf:./folder)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--trigger", default="", metavar="WORD", help="trigger word; replaces [V] in captions")
    parser.add_argument(
        "--resolution", type=int_argument(1), metavar="N",
        help="training resolution: an image has about N x N pixels; default: the model's",
    )  # fmt: skip
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that must contain all images; default: DATASET's"
    )
    add_teacher(parser)
    parser.add_argument(
        "--heldout-caption", metavar="TEXT", help="a caption that is not trained on, to measure the gap to the teacher"
    )
    parser.add_argument(
        "--empty-captions", action="store_true", help="encode the empty caption too, for train --caption-dropout"
    )
    parser.add_argument(
        "--shard-size", type=int_argument(1), default=SHARD_SIZE, metavar="N",
        help="images per shard, which one process holds in memory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-errors", action="store_true",
        help="leave out images that cannot be used, and list them, in place of stopping at the end",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int_argument(1), metavar="N", help="number of CPU threads; default: torch's choice"
    )
    _add_columns(parser)
    add_model_arguments(parser)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Hugging Face datasets")
    group.add_argument("--split", default="train", metavar="NAME", help="the split (default: %(default)s)")
    group.add_argument("--subset", default="", metavar="NAME", help="the configuration, if there are several")
    group.add_argument("--revision", default="", metavar="NAME", help="branch, tag or commit on the hub")
    group.add_argument("--image-column", default="", metavar="NAME", help="default: the only column with images")
    group.add_argument(
        "--caption-column", default="", metavar="NAME", help="default: the columns that a row of a .jsonl may have"
    )
