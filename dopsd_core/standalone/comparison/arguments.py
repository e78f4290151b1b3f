"""The arguments of `python -m dopsd_core compare`; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...number_text import float_argument, int_argument
from .methods import PRESETS, RATES, REFERENCE

REGIMES = ("steps", "time", "error", "work")


def add_compare(commands: Any) -> None:
    """Adds the command to the subparsers of `python -m dopsd_core`."""
    listed = "; ".join(f"{name}: {', '.join(m.name for m in methods)}" for name, methods in PRESETS.items())
    parser = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="compare training methods on the demo model, with intervals",
        description="Trains every method on several unseen concepts with several seeds, at equal steps, equal wall "
        "time and equal concept error, and writes tables with paired bootstrap intervals, comparison.json and a "
        f"contact sheet. Finished trials are kept: run the same command again to resume. The presets: {listed}.",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="methods", help="methods (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="of the preset only these, and the reference"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="TEXT",
        help='another method, "name: option=value, option=value" with the options of train; undistilled=true trains '
        "the model before its distillation; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--reference", default=REFERENCE, metavar="NAME",
        help="the method that the others are compared with; equal time is the time of its steps (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--regimes", nargs="+", choices=REGIMES, default=REGIMES[:3], metavar="REGIME",
        help="what is equal: steps, time, error (default: these three), or work, alone: FLOPs, on any machine; time "
        "needs a machine that does nothing else",
    )  # fmt: skip
    parser.add_argument("--style", action="store_true", help="learn styles instead of subjects")
    _add_number(parser, "--concepts", 5, "number of concepts")
    _add_number(parser, "--first-concept", 0, "seed of the first concept", low=0)
    _add_number(parser, "--seeds", 4, "training runs per concept and method")
    _add_number(parser, "--steps", 60, "optimizer steps at equal steps")
    _add_number(parser, "--max-steps", 240, "largest number of steps at equal concept error")
    _add_number(parser, "--work", 1000, "forwards of one image, at equal work")
    _add_number(parser, "--check-every", 10, "steps between two measurements of the concept error")
    parser.add_argument(
        "--level",
        type=float_argument(0.0),
        default=0.05,
        metavar="X",
        help="concept error to stop at (default: %(default)s)",
    )
    _add_number(parser, "--tune", 0, "find each method's learning rate on N other concepts first; 0: as given", low=0)
    parser.add_argument(
        "--rates", type=float_argument(0.0), nargs="+", default=RATES, metavar="X",
        help="the learning rates that --tune tries (default: %(default)s)",
    )  # fmt: skip
    _add_number(parser, "--jobs", 2, "parallel runs, one CPU core each")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help="default: %(default)s")


def _add_number(parser: argparse.ArgumentParser, name: str, default: int, about: str, low: int = 1) -> None:
    parser.add_argument(
        name, type=int_argument(low), default=default, metavar="N", help=f"{about} (default: %(default)s)"
    )
