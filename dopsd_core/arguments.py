"""The command line's arguments, and how they become a configuration. Loads nothing heavy: --help must be quick."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig

OBJECTIVES = ("dopsd", "sft")
COMMANDS = ("demo", "train", "sample", "inspect-dataset")

_CONFIG_OPTIONS: Mapping[str, tuple[dict[str, Any], str]] = {
    "objective": ({"choices": OBJECTIVES}, "self-distillation, or plain supervised fine-tuning for comparison"),
    "steps": ({"type": int}, "optimizer steps; may be raised when a run is continued"),
    "lr": ({"type": float}, "learning rate after warm-up"),
    "schedule": ({"choices": ("constant", "cosine")}, "course of the learning rate after warm-up"),
    "warmup": ({"type": int}, "steps over which the learning rate rises"),
    "batch_size": ({"type": int}, "pictures in a forward; they share a size"),
    "grad_accumulation": ({"type": int}, "batches in an optimizer step"),
    "clip": ({"type": float}, "largest gradient norm; 0 for no limit"),
    "rollout_steps": ({"type": int}, "K, the steps of the student's own rollout"),
    "grad_steps": ({"type": int}, "train on so many of the K steps, drawn at random: cheaper, noisier; default all"),
    "loss": ({"choices": ("x0", "velocity")}, "what student and teacher are compared in"),
    "teacher": (
        {"choices": ("ema", "frozen", "same")},
        "average of the student, untouched base, or the student itself",
    ),
    "ema_decay": ({"type": float}, "of the ema teacher, per step"),
    "anchor_probability": ({"type": float}, "share of batches that hold ordinary prompts at the untouched base"),
    "caption_dropout": ({"type": float}, "share of visits with an empty caption"),
    "optimizer": ({"choices": ("adamw", "adamw8bit")}, "adamw8bit needs bitsandbytes and an NVIDIA GPU"),
    "weight_decay": ({"type": float}, "decoupled, of AdamW"),
    "sft_sigmas": ({"choices": ("logit-normal", "uniform", "grid")}, "noise levels of objective sft"),
    "sft_shift": ({"type": float}, "moves those towards noise; 1 for none"),
    "seed": ({"type": int}, "of the LoRA's start, the order of the data and all noise"),
    "checkpoint_every": ({"type": int}, "steps between checkpoints"),
    "keep_checkpoints": ({"type": int}, "how many of the last checkpoints stay"),
    "probe_every": ({"type": int}, "steps between measurements of the gap to the teacher; 0 for none"),
    "probe_pairs": ({"type": int}, "training pairs in that measurement"),
    "preview_every": ({"type": int}, "steps between preview pictures; 0 for none"),
    "deterministic": (
        {"action": argparse.BooleanOptionalAction},
        "torch's deterministic algorithms: equal runs end bit-identical on a GPU too; slower",
    ),
}
"""Fields of TrainConfig as options; absent ones keep the value of --config or of the model's defaults."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m dopsd_core`; `command` in its result is one of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="python -m dopsd_core",
        description="Teach a few-step image model a concept from a few pictures, and keep its few-step quality "
        "(on-policy self-distillation, arXiv 2605.05204).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_inspect(commands)
    return parser


def config_from_args(args: argparse.Namespace, defaults: Mapping[str, Any]) -> TrainConfig:
    """The configuration of `train`: the options given, over --config or else `defaults` (fields of TrainConfig).

    `defaults["lora"]` is a LoraConfig; --rank without --alpha keeps alpha / rank.

    Raises:
        ConfigError: with every problem.
        ValueError: the file of --config is not UTF-8.
        OSError: it cannot be read.
    """
    import dataclasses

    from .config import ConfigError, TrainConfig

    base = TrainConfig.from_json(_read_text(args.config)) if args.config else TrainConfig(**defaults)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    fields |= {name: getattr(args, name) for name in _CONFIG_OPTIONS if getattr(args, name) is not None}
    rank = args.rank or base.lora.rank
    alpha = args.alpha if args.alpha is not None else base.lora.scale * rank
    try:
        fields["lora"] = dataclasses.replace(
            base.lora, rank=rank, alpha=alpha, targets=tuple(args.targets or base.lora.targets)
        )
    except ValueError as error:
        raise ConfigError((str(error),)) from error
    return TrainConfig(**fields)


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
        help="teach the embedded demo model a concept that it has never seen, and report how well",
        description="Renders four pictures with captions of a concept that the demo model has never seen, shows what "
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
        help="train a LoRA on a data set",
        description="Trains a LoRA on a folder of pictures with .txt captions beside them, or on a JSONL. Everything "
        "of the run is kept in --output; the same command again continues a run that was stopped or killed. Ctrl-C "
        "saves and stops.",
    )
    _add_dataset(parser, "side of a square with as many pixels as a training picture has; default: the model's")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run and of its LoRA")
    parser.add_argument("--model", default="demo", choices=("demo",), help="what to train (default: %(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of another run to take settings from")
    parser.add_argument(
        "--teacher-image", choices=("own", "other"), default="own",
        help="show the teacher the picture that is trained, or up to three others of the data set in turn",
    )  # fmt: skip
    parser.add_argument(
        "--heldout-caption", metavar="TEXT", help="a caption that is not trained, to measure the gap to the teacher on"
    )
    parser.add_argument("--fresh", action="store_true", help="refuse to continue a run that is in --output already")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: what torch chooses")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--rank", type=int, help="size of the LoRA")
    lora.add_argument("--alpha", type=float, help="its output is scaled by alpha / rank; default: keeps the ratio")
    lora.add_argument("--targets", nargs="+", metavar="PATTERN", help="names or patterns of the layers that get one")
    settings = parser.add_argument_group("settings", "defaults: those of --config, or of the model")
    for name, (options, text) in _CONFIG_OPTIONS.items():
        metavar = {"metavar": "N" if options["type"] is int else "X"} if "type" in options else {}
        settings.add_argument(f"--{name.replace('_', '-')}", help=text, **options, **metavar)


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="make pictures with or without a LoRA",
        description="Samples the model in its few steps. With --teacher-image it shows what the teacher makes of a "
        "picture: look at that before training, for the student becomes as good as its teacher and no better.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; one picture or more for each")
    parser.add_argument("--output", type=Path, default=Path("samples"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--model", default="demo", choices=("demo",), help="default: %(default)s")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="LoRA to draw with")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="of the LoRA (default: %(default)s)")
    parser.add_argument("--teacher-image", type=Path, metavar="FILE", help="show this picture to the teacher")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="pictures per prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the model's")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels; default: the model's")


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect-dataset",
        help="list everything that is wrong with a data set, before training",
        description="Opens every picture and caption of a data set and lists all problems with file and line. Exit "
        "code 1 when there are errors, 0 when there are at most warnings.",
    )
    _add_dataset(parser, "side of a square with as many pixels as a training picture has (default: %(default)s)", 1024)
    parser.add_argument(
        "--multiple", type=int, default=16, metavar="N", help="sides are multiples of N pixels (default: %(default)s)"
    )


def _add_dataset(parser: argparse.ArgumentParser, resolution_help: str, resolution: int | None = None) -> None:
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="folder of pictures and .txt captions, of edits in source/ and target/, or a .jsonl",
    )
    parser.add_argument("--trigger", default="", metavar="WORD", help="word for the concept; replaces [V] in captions")
    parser.add_argument("--resolution", type=int, default=resolution, metavar="N", help=resolution_help)
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="visits per epoch of each image, up to 1000"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="pictures may not lie outside of it; default: DATASET's"
    )
