"""The command line's arguments, and how they become a configuration. Loads nothing heavy: --help must be quick.

The options of training are made from what `TrainConfig` and the variants in its registries declare.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .demo.settings import demo_config
from .options import Option, all_options, changed

COMMANDS = ("demo", "train", "sample", "inspect-dataset")

_METAVARS = {int: "N", float: "X", str: "TEXT"}
_NONE = "none"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `python -m dopsd_core`; ends the process with a message where they make no sense."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = _commands(parser)[args.command]._option_string_actions
        near = {word: difflib.get_close_matches(word, known, n=1) for word in unknown if word.startswith("-")}
        hints = [f"did you mean {match[0]} instead of {word}?" for word, match in near.items() if match]
        parser.error(" ".join(["unrecognized arguments:", *unknown, *(f"({hint})" for hint in hints)]))
    return args


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m dopsd_core`; `command` in its result is one of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="python -m dopsd_core",
        allow_abbrev=False,
        description="Teach a few-step image model a concept from a few images, and keep its few-step quality "
        "(on-policy self-distillation, arXiv 2605.05204).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_inspect(commands)
    return parser


def config_from_args(args: argparse.Namespace, defaults: TrainConfig) -> TrainConfig:
    """The configuration of `train`: the options given, over --config or else over `defaults`.

    Raises:
        ConfigError: with every problem.
        ValueError: the file of --config is not UTF-8.
        OSError: it cannot be read.
    """
    base = TrainConfig.from_json(_read_text(args.config)) if args.config else defaults
    given = {option.name: option for option in _train_options() if option.name in args}
    return changed(base, {name: _value(option, getattr(args, name)) for name, option in given.items()})


def _train_options() -> list[Option]:
    """What the command line offers of the configuration, the model's defaults in it."""
    return [option for option in all_options(TrainConfig, demo_config()) if not option.hint.from_host]


def _value(option: Option, given: Any) -> Any:
    """What an option was given, in its type where that is possible: what is not is for the configuration to report."""
    if option.is_many:
        return tuple(given)
    if option.is_optional and given == _NONE:
        return None
    try:
        return option.kind(given)
    except ValueError:
        return given


def _read_text(file: Path) -> str:
    """Raises ValueError with the file's name when it is not UTF-8; Windows' own consoles write UTF-16."""
    from .data.captions import CaptionError, decode_utf8

    try:
        return decode_utf8(file.read_bytes())
    except CaptionError as error:
        raise ValueError(f"{file}: {error}") from error


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="teach the embedded demo model a concept that it has never seen, and report how well",
        description="Renders four images with captions of a concept that the demo model has never seen, shows what "
        "its teacher makes of them, trains (D-OPSD, and SFT for comparison), and writes the LoRA, a contact sheet, "
        "curves and report.json. A few minutes on two CPU cores, no download.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--concept-seed", type=int, default=0, metavar="N", help="another unseen concept of the same world"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="training runs to average (default 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps, the same for every method")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a CPU core each (default 2)")


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a LoRA on a dataset",
        description="Trains a LoRA on a folder of images with .txt captions beside them, or on a JSONL. Everything "
        "of the run is kept in --output; the same command again resumes a run that was stopped or killed. Ctrl-C "
        "saves and stops. Defaults in brackets are those of the demo model; --config takes another run's settings.",
    )
    _add_dataset(parser, "side of a square with as many pixels as a training image has; default: the model's")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run and of its LoRA")
    parser.add_argument("--model", default="demo", choices=("demo",), help="what to train (default: %(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of another run to take settings from")
    parser.add_argument(
        "--teacher-image", choices=("own", "other"), default="own",
        help="show the teacher the image that is trained, or up to three others of the dataset in turn",
    )  # fmt: skip
    parser.add_argument(
        "--heldout-caption", metavar="TEXT", help="a caption that is not trained, to measure the gap to the teacher on"
    )
    parser.add_argument("--fresh", action="store_true", help="refuse to continue a run that is in --output already")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: what torch chooses")
    groups: dict[str, Any] = {}
    for option in _train_options():
        title = _group(option)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], option)


def _group(option: Option) -> str:
    """The heading that an option stands under: the run, a choice, or what can be chosen."""
    if option.setting:
        return f"with --{option.setting} {' or '.join(option.variants)}"
    return option.name if option.choices else "run"


def _add_option(group: Any, option: Option) -> None:
    name, text = f"--{option.name.replace('_', '-')}", f"{option.help} ({option.facts()})".replace("%", "%%")
    if option.kind is bool:
        group.add_argument(name, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=text)
        return
    words = "{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.kind]
    group.add_argument(
        name,
        default=argparse.SUPPRESS,
        metavar="PATTERN" if option.is_many else words,
        nargs="+" if option.is_many else None,
        help=text,
    )


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        allow_abbrev=False,
        help="make images with or without a LoRA",
        description="Samples the model in its few steps. With --teacher-image it shows what the teacher makes of a "
        "image: look at that before training, for the student becomes as good as its teacher and no better.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; one image or more for each")
    parser.add_argument("--output", type=Path, default=Path("samples"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--model", default="demo", choices=("demo",), help="default: %(default)s")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="LoRA to draw with")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="of the LoRA (default: %(default)s)")
    parser.add_argument("--teacher-image", type=Path, metavar="FILE", help="show this image to the teacher")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the model's")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels; default: the model's")


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect-dataset",
        allow_abbrev=False,
        help="list everything that is wrong with a dataset, before training",
        description="Opens every image and caption of a dataset and lists all problems with file and line. Exit "
        "code 1 when there are errors, 0 when there are at most warnings.",
    )
    _add_dataset(parser, "side of a square with as many pixels as a training image has (default: %(default)s)", 1024)
    parser.add_argument(
        "--multiple", type=int, default=16, metavar="N", help="sides are multiples of N pixels (default: %(default)s)"
    )


def _add_dataset(parser: argparse.ArgumentParser, resolution_help: str, resolution: int | None = None) -> None:
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="folder of images and .txt captions, of edits in source/ and target/, or a .jsonl",
    )
    parser.add_argument("--trigger", default="", metavar="WORD", help="word for the concept; replaces [V] in captions")
    parser.add_argument("--resolution", type=int, default=resolution, metavar="N", help=resolution_help)
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="visits per epoch of each image, up to 1000"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="images may not lie outside of it; default: DATASET's")
