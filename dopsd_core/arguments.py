"""Command-line arguments and their conversion to a configuration. Imports nothing heavy, so that --help is fast.

The training options are generated from the declarations of `TrainConfig` and the variants in its registries.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from .conditioning.teachers import TEACHER_VIEWS, Background
from .config import TrainConfig
from .demo.settings import demo_config
from .metrics.arguments import add_evaluate
from .number_text import float_argument, int_argument
from .option_arguments import add_option, given_values
from .options import Option, all_options, changed
from .presets import ON_COMMAND_LINE
from .standalone.caption_arguments import add_caption
from .standalone.comparison.arguments import add_compare
from .standalone.encoding_arguments import add_encode
from .standalone.model_options import MODEL_HELP, TRACKERS, add_model_arguments

COMMANDS = (
    "demo", "train", "encode", "sample", "teacher-preview", "compare", "evaluate", "inspect-dataset", "caption",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of `python -m dopsd_core`; exits with a message if they are invalid."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = _commands(parser)[args.command]._option_string_actions
        near = {word: difflib.get_close_matches(word, known, n=1) for word in unknown if word.startswith("-")}
        hints = [f"did you mean {match[0]} instead of {word}?" for word, match in near.items() if match]
        parser.error(" ".join(["unrecognized arguments:", *unknown, *(f"({hint})" for hint in hints)]))
    return args


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m dopsd_core`; `command` of its result is one of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="python -m dopsd_core",
        allow_abbrev=False,
        description="Teach a few-step image model a concept from a few images and keep its few-step quality "
        "(on-policy self-distillation, arXiv 2605.05204).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    add_encode(commands, _add_teacher)
    _add_sample(commands)
    _add_teacher_preview(commands)
    add_compare(commands)
    add_evaluate(commands, add_model_arguments)
    _add_inspect(commands)
    add_caption(commands)
    return parser


def config_from_args(args: argparse.Namespace, defaults: TrainConfig) -> TrainConfig:
    """The configuration of `train`: the given options on top of --config or `defaults`.

    With an adapter that trains the network, in place of one that does not, the learning rate is the usual one for it
    unless it is given.

    Raises:
        ConfigError: values are invalid; the message lists every problem.
        ValueError: the file of --config is not UTF-8.
        OSError: it cannot be read.
    """
    base = TrainConfig.from_json(_read_text(args.config)) if args.config else defaults
    given = given_values(args, _train_options())
    made = changed(base, given)
    has_own_rate = "lr" in given or bool(made.optimizer.prefix)
    if has_own_rate or made.adapter.trains_network == base.adapter.trains_network:
        return made
    return made.replace(optimizer=made.optimizer.replace(lr=made.adapter.usual_rate(made.optimizer.lr)))


def _train_options() -> list[Option]:
    """The options on the command line, with the model's defaults."""
    return [option for option in all_options(TrainConfig, demo_config()) if not option.hint.from_host]


def _read_text(file: Path) -> str:
    """Raises ValueError with the file's name if it is not UTF-8; Windows consoles write UTF-16."""
    from .data.captions import CaptionError, decode_utf8

    try:
        return decode_utf8(file.read_bytes())
    except CaptionError as error:
        raise ValueError(f"{file}: {error}") from error


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="teach the embedded demo model a new concept and report how well it was learned",
        description="Renders four images with captions of a concept that the demo model has never seen, draws samples "
        "of its teacher, trains (D-OPSD, and SFT and DreamBooth for comparison), and writes the LoRA, a contact sheet, "
        "curves and report.json. Takes a few minutes on two CPU cores, without any download.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--concept-seed", type=int_argument(), default=0, metavar="N", help="selects the unseen concept (default 0)"
    )
    parser.add_argument(
        "--seeds", type=int_argument(1), default=1, metavar="N", help="training runs to average (default 1)"
    )
    parser.add_argument("--steps", type=int_argument(1), metavar="N", help="optimizer steps, the same for every method")
    parser.add_argument(
        "--jobs", type=int_argument(1), default=2, metavar="N", help="parallel runs, one CPU core each (default 2)"
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a LoRA on a dataset",
        description="Trains a LoRA on a folder of images with .txt captions beside them, on a JSONL file, or on what "
        "encode wrote. All files of the run are in --output; run the same command again to resume a run that was "
        "stopped or killed. Ctrl-C saves and stops. Defaults in parentheses are for the demo model; --config loads "
        "another run's settings. On several GPUs: accelerate launch -m dopsd_core train ...; the processes share the "
        "batches of each step.",
    )
    _add_dataset(parser, "training resolution: an image has about N x N pixels; default: the model's")
    parser.add_argument(
        "--resolutions", nargs="+", metavar="N:SHARE",
        help="several resolutions in one run, in place of --resolution, such as 512:2 768 1024: drawn by share, 1 "
        "where none is given; --small-first begins with the smaller ones, which need less time",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the run and its LoRA")
    parser.add_argument(
        "--preset", choices=tuple(ON_COMMAND_LINE),
        help="settings that fit together, by what is trained; other options go over them (default: subject; "
        "not for the demo model, which has its own)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of another run to load settings from")
    _add_view(parser)
    _add_prompts(parser)
    parser.add_argument(
        "--track", nargs="+", choices=TRACKERS, default=["auto"],
        help="write curves and previews also to these trackers of accelerate; auto is tensorboard if it is installed "
        "(default: auto)",
    )  # fmt: skip
    _add_speed(parser)
    parser.add_argument(
        "--heldout-caption", metavar="TEXT", help="a caption that is not trained on, to measure the gap to the teacher"
    )
    parser.add_argument(
        "--initial-lora", type=Path, metavar="FILE",
        help="LoRA, DoRA or LoKr file of any trainer, or peft folder, to start from: of the kind of --adapter, of its "
        "rank or less",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="fail if --output already contains a run")
    parser.add_argument(
        "--threads", type=int_argument(1), metavar="N", help="number of CPU threads; default: torch's choice"
    )
    add_model_arguments(parser)
    groups: dict[str, Any] = {}
    for option in _train_options():
        title = _group(option)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_option(groups[title], option)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--anchor-prompts", nargs="+", metavar="TEXT", help="further ordinary prompts for the prior anchors"
    )
    parser.add_argument(
        "--regularisation", type=Path, metavar="DIR",
        help="folder of ordinary images with captions, which should not change: their captions are prior anchors too, "
        "and for dreambooth the images are its class images",
    )  # fmt: skip
    parser.add_argument(
        "--preview-prompts", nargs="+", metavar="TEXT",
        help="prompts to draw with --preview-every; default: the captions of the first images",
    )  # fmt: skip


def _add_speed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint-blocks", type=int_argument(0), metavar="N",
        help="number of blocks with full gradient checkpointing; default: as much as the GPU's memory makes necessary, "
        "in which blocks keep what costs most to compute again",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help="compile the transformer blocks with torch.compile, apart from their Linears: the first steps take "
        "minutes longer; what it gains has not been measured",
    )  # fmt: skip


def _group(option: Option) -> str:
    """The heading of an option's group: the run, a choice, or one of its variants."""
    if option.setting:
        return f"with --{option.setting} {' or '.join(option.variants)}"
    return option.name if option.choices else "run"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        allow_abbrev=False,
        help="sample images with or without a LoRA",
        description="Samples the model in its few steps. With --teacher-image it samples the teacher that sees this "
        "image. Check the teacher before training: the student gets no better than its teacher.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="prompts; --count images each")
    parser.add_argument("--output", type=Path, default=Path("samples"), metavar="DIR", help="default: %(default)s")
    add_model_arguments(parser)
    parser.add_argument(
        "--lora", type=Path, metavar="FILE",
        help="LoRA file to apply; a run's folder for one sheet of the LoRAs that --save-every kept, steps by prompts",
    )  # fmt: skip
    parser.add_argument(
        "--strength", type=float_argument(), default=1.0, metavar="X", help="LoRA strength (default: %(default)s)"
    )
    parser.add_argument("--teacher-image", type=Path, metavar="FILE", help="image for the teacher to see")
    _add_teacher_view(parser, [name for name, view in TEACHER_VIEWS.items() if view.sees != "nothing"])
    parser.add_argument(
        "--count", type=int_argument(1), default=1, metavar="N", help="images per prompt (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int_argument(1), metavar="N", help="sampling steps; default: the model's")
    parser.add_argument(
        "--seed", type=int_argument(), default=0, metavar="N", help="seed of image 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=int_argument(1), nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels; default: the model's"
    )


def _add_teacher_preview(commands: Any) -> None:
    parser = commands.add_parser(
        "teacher-preview",
        allow_abbrev=False,
        help="draw what the teacher draws, before any training",
        description="Draws the first training images, what the untouched model draws as the teacher that sees them, "
        "and as the student that reads their captions alone. The student gets no better than its teacher.",
    )
    _add_dataset(parser, "training resolution: an image has about N x N pixels; default: the model's")
    parser.add_argument(
        "--output", type=Path, default=Path("teacher.png"), metavar="FILE", help="the sheet (default: %(default)s)"
    )
    _add_view(parser)
    parser.add_argument(
        "--count", type=int_argument(1), default=4, metavar="N", help="images to show (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int_argument(1), metavar="N", help="sampling steps; default: the model's")
    parser.add_argument(
        "--seed", type=int_argument(), default=0, metavar="N", help="seed of the noise (default: %(default)s)"
    )
    add_model_arguments(parser)


def _add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher-image", choices=("own", "other"), default="own",
        help="which image the teacher sees: the training image itself, or up to three others of the dataset in turn",
    )  # fmt: skip
    _add_teacher(parser)


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    _add_teacher_view(parser)
    parser.add_argument(
        "--teacher-background", choices=get_args(Background), default="keep",
        help="what the teacher sees around the subject of images with a mask, a.mask.png or their transparency; remove "
        "leaves white (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--teacher-sentence", default="", metavar="TEXT",
        help="appended to the caption that the teacher reads, for edits; - for none; default: the view's own. With the "
        "view words, what it reads in place of words of the caption, such as 'face -> smiling face'",
    )  # fmt: skip


def _add_teacher_view(parser: argparse.ArgumentParser, views: Sequence[str] = tuple(TEACHER_VIEWS)) -> None:
    parser.add_argument(
        "--teacher-view", choices=("auto", *views), default="auto",
        help="how the teacher sees an image: through a vision tower (vlm) or as the reference of an edit; words: not "
        "at all, but it reads other words, for a slider; auto is the model's own way (default: %(default)s)",
    )  # fmt: skip


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect-dataset",
        allow_abbrev=False,
        help="check a dataset before training",
        description="Opens every image and caption of a dataset and lists all problems with file and line. The exit "
        "code is 1 if there are errors, and 0 if there are only warnings or none.",
    )
    _add_dataset(parser, "training resolution: an image has about N x N pixels; default: the model's, or 1024")
    parser.add_argument(
        "--multiple",
        type=int_argument(1),
        metavar="N",
        help="sizes are multiples of N pixels; default: the model's, or 16",
    )
    parser.add_argument("--model", metavar="MODEL", help=f"model whose sizes to use: {MODEL_HELP.rpartition(' (')[0]}")


def _add_dataset(parser: argparse.ArgumentParser, resolution_help: str, resolution: int | None = None) -> None:
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="folder of images and .txt captions, folder of edits in source/ and target/, or .jsonl file",
    )
    parser.add_argument("--trigger", default="", metavar="WORD", help="trigger word; replaces [V] in captions")
    parser.add_argument("--resolution", type=int_argument(1), default=resolution, metavar="N", help=resolution_help)
    parser.add_argument(
        "--repeats", type=int_argument(1), default=1, metavar="N", help="repeats of each image per epoch, up to 1000"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that must contain all images; default: DATASET's"
    )
