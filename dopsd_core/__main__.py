"""`python -m dopsd_core`: demo, train, encode, sample, teacher-preview, compare, evaluate, inspect-dataset, caption."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING

from .arguments import config_from_args, parse_args
from .config import ConfigError
from .demo.settings import demo_config
from .presets import ON_COMMAND_LINE, USUAL
from .standalone.caption_arguments import caption_options_from_args
from .text import escape_unencodable, printable

if TYPE_CHECKING:
    from .config import TrainConfig

log = logging.getLogger("dopsd")

STANDALONE = {"torch", "diffusers", "transformers", "accelerate", "tqdm", "matplotlib", "peft"}

_SHARED = ("train", "encode")
"""Commands that several processes share."""

_AFTER_CTRL_C = {
    "train": "; the same command resumes from the last checkpoint",
    "encode": "; the same command continues with the shards that are missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 success, 1 user error (reported without traceback), 130 Ctrl-C.

    Characters that the console or pipe cannot encode are escaped. Of several processes one reports an error that others
    have too.
    """
    escape_unencodable(sys.stdout, sys.stderr)
    args = _parsed(argv)
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        if _reports("interrupted"):
            _complain(f"interrupted{_AFTER_CTRL_C.get(args.command, '')}")
        return 130
    except Exception as error:
        message, is_reported = _in_a_sentence(error), _reports(error)
        if message is None and is_reported:
            raise
        log.debug("where the error came from", exc_info=True)
        if message is not None and is_reported:
            _complain(message)
        return 1


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    if _processes() == 1:
        return parse_args(argv)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse_args(argv)
    except SystemExit:
        if said.getvalue() and _reports(said.getvalue()):
            sys.stderr.write(said.getvalue())
        raise


def _processes() -> int:
    """The number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def _reports(error: Exception | str) -> bool:
    if _processes() == 1:
        return True
    from .standalone.one_voice import reports

    return reports(error)


def _in_a_sentence(error: Exception) -> str | None:
    """What the user needs to know; None for an error of the program, whose traceback is needed."""
    if not isinstance(error, ModuleNotFoundError):
        return str(error) if _is_users_mistake(error) else None
    if (error.name or "").partition(".")[0] not in STANDALONE:
        return None
    return f'{error.name} is missing: pip install "comfyui-dopsd[standalone]", or use `make demo`'


def inspect_dataset(args: argparse.Namespace) -> int:
    """Prints the report of a dataset and returns the exit code: 1 if it has errors, else 0."""
    from .data.dataset import read_dataset
    from .standalone.datasets import require_images

    require_images(args.dataset)
    side, multiple = _sizes(args.model)
    report = read_dataset(
        args.dataset,
        pixel_budget=(args.resolution or side) ** 2,
        multiple=args.multiple or multiple,
        trigger=args.trigger,
        repeats=args.repeats,
        root=args.root,
    )
    sys.stdout.write(report.describe() + "\n")
    return 1 if report.errors else 0


def _sizes(model: str | None) -> tuple[int, int]:
    """(side of an image, what its sides are multiples of) in pixels for a model."""
    if model is None:
        return 1024, 16
    from .families import Z_IMAGE, get_family
    from .standalone.hosts.source import find_family
    from .standalone.model_options import ModelOptions

    options = ModelOptions(model=model)
    if options.is_demo:
        from .demo.world import IMAGE_SIZE

        return IMAGE_SIZE, Z_IMAGE.pixel_multiple
    family = get_family(find_family(options).family)
    return round(family.pixel_budget**0.5), family.pixel_multiple


def _dispatch(args: argparse.Namespace) -> int:
    _require_one_process(args.command)
    if args.command == "inspect-dataset":
        return inspect_dataset(args)
    if args.command == "train":  # before torch is loaded
        args.train_config = config_from_args(args, _default_config(args))
    if args.command == "caption":
        args.caption_options = caption_options_from_args(args)
    return _command(args.command)(args) or 0


def _require_one_process(command: str) -> None:
    """Raises ValueError if a launcher started several processes of a command that does not share its work."""
    if (processes := _processes()) > 1 and command not in _SHARED:
        raise ValueError(
            f"{command} runs in one process, and a launcher started {processes}: leave out accelerate or torchrun"
        )


def _default_config(args: argparse.Namespace) -> TrainConfig:
    from .standalone.model_options import ModelOptions

    options = ModelOptions.of(args)
    if options.is_demo:
        if args.preset:
            raise ConfigError(("--preset is for real models; the demo model has settings of its own: leave it out",))
        return demo_config()
    if args.preset and args.config:
        raise ConfigError(("--preset and --config both choose all settings: give one of them",))
    from .standalone.hosts.source import find_family
    from .standalone.settings import family_config

    return family_config(find_family(options).family, ON_COMMAND_LINE[args.preset or USUAL])


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    if name == "demo":
        from .standalone.cli import run_demo

        return run_demo
    if name == "train":
        from .standalone.training import run_train

        return run_train
    if name == "encode":
        from .standalone.encoding import run_encode

        return run_encode
    if name == "compare":
        from .standalone.comparison.command import run_compare

        return run_compare
    if name == "evaluate":
        from .standalone.evaluate_lora import run_evaluate

        return run_evaluate
    if name == "caption":
        from .standalone.caption import run_caption

        return run_caption

    from .standalone import sampling

    return sampling.run_sample if name == "sample" else sampling.run_teacher_preview


def _is_users_mistake(error: Exception) -> bool:
    """Whether the message is all that the user needs: invalid input, missing files."""
    if isinstance(error, ValueError | OSError):
        return True
    from .files.lock import FolderInUse
    from .training.checkpoint import StateError
    from .training.nonfinite import NonFiniteError
    from .training.world import PeerError

    return isinstance(error, StateError | NonFiniteError | FolderInUse | PeerError)


def _complain(message: str) -> None:
    sys.stderr.write(printable(f"error: {message}\n"))


if __name__ == "__main__":
    sys.exit(main())
