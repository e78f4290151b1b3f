"""The arguments of `python -m dopsd_core evaluate`. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..number_text import float_argument, int_argument

WEIGHTS = {
    "dino": "DINO-D: folder or hub id of a DINOv3",
    "lpips": "LPIPS-D: file, folder or hub id of VGG-16",
    "clip": "CLIP-S: file, folder or hub id of an open_clip model",
    "vlm": "VLM-J: folder or hub id of a Qwen3-VL",
    "hpsv3": "HPSv3: file, folder or hub id of its weights",
}
"""Metrics of the paper, by the name of their option."""


def add_evaluate(commands: Any, add_model: Callable[[Any], None]) -> None:
    """Adds the command to the parser's subparsers; add_model: adds the options that choose a model."""
    parser = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="report card of a LoRA: concept, following, few steps, retention",
        description="Draws the same prompts with and without a LoRA from the same noise, scores them, and writes "
        "report_card.png and report_card.json. The demo's judge scores the demo model; the metrics of the paper need "
        'pip install "comfyui-dopsd[metrics]" and weights. With --layout it only writes the images of a benchmark, as '
        "its own scorer reads them.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="DATASET",
        help="dataset that the LoRA was trained on; with --layout the benchmark's prompts: GenEval's "
        "evaluation_metadata.jsonl, DPG-Bench's folder of prompts",
    )
    parser.add_argument("--lora", type=Path, metavar="FILE", help="the LoRA; only with --layout it may be missing")
    parser.add_argument(
        "--strengths", type=float_argument(), nargs="+", default=[1.0], metavar="X", help="LoRA strengths (default: 1)"
    )
    parser.add_argument(
        "--trigger", default="", metavar="WORD", help="trigger word; replaces [V] (default: the LoRA's)"
    )
    parser.add_argument("--class-name", default="", metavar="NAME", help="what the concept is, such as dog, for CLIP-S")
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="PROMPT",
        help="with [V] or the trigger: other scenes of the concept; without it: ordinary prompts, for retention; "
        "default: those of the demo's world for the demo model, none for others",
    )
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int_argument(), default=0, metavar="N", help="seed of the noise (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int_argument(1), default=2, metavar="N", help="images per prompt (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int_argument(1), metavar="N", help="sampling steps; default: the model's")
    parser.add_argument("--resolution", type=int_argument(1), metavar="N", help="images have about N x N pixels")
    parser.add_argument("--layout", choices=("geneval", "dpg"), help="write the images of this benchmark instead")
    parser.add_argument(
        "--vlm-kind", default="instance", choices=("instance", "style"), help="what the concept is, for VLM-J"
    )
    parser.add_argument(
        "--metrics-device", metavar="NAME", help="device of the metrics; default: that of --device, else cpu"
    )
    parser.add_argument("--download", action="store_true", help="download weights that are given as hub ids")
    for name, text in WEIGHTS.items():
        parser.add_argument(f"--{name}", metavar="WEIGHTS", help=text)
    add_model(parser)
