"""Reliability measurements: kills, bad input, load, cancellation, full disks, hostile paths.

    python -m benchmarks.reliability kills                  200 SIGKILLs, each resumed
    python -m benchmarks.reliability fuzz                   50,000 damaged inputs
    python -m benchmarks.reliability server-kills           10 SIGKILLs of a ComfyUI server in a training
    python -m benchmarks.reliability trainings              200 trainings in one ComfyUI server
    python -m benchmarks.reliability moments                cancels, full disks and the like, and what the user sees
    python -m benchmarks.reliability paths                  100 attempts to reach outside of the allowed folders
    python -m benchmarks.reliability render                 docs/reliability.md from docs/reliability.json

Each command measures one thing, continues where it was stopped (--fresh starts anew) and records what it found in
docs/reliability.json, from which docs/reliability.md is written. Exit code 1 when something was not as it must be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.report import RELIABILITY, WORK, Section, comfyui_version, measured_here, record, render


def kills(args: argparse.Namespace) -> Section:
    """Kills a training again and again."""
    from benchmarks import reliability_kills

    return reliability_kills.measure(args.count, args.steps, args.seed, args.work, args.fresh)


def fuzz(args: argparse.Namespace) -> Section | str:
    """Reads damaged inputs, or one of them again."""
    from benchmarks import reliability_fuzz
    from benchmarks.reliability_inputs import KINDS
    from benchmarks.reliability_worker import all_kinds

    kinds = KINDS if args.core else all_kinds()
    if args.only:
        return reliability_fuzz.show(kinds, args.only, args.seed, args.work)
    return reliability_fuzz.measure(args.count, args.seed, args.jobs, args.work, args.fresh, kinds)


def trainings(args: argparse.Namespace) -> Section:
    """Trains again and again in one server."""
    from benchmarks import reliability_load

    return reliability_load.measure(args.count, args.work, args.fresh)


def server_kills(args: argparse.Namespace) -> Section:
    """Kills a server in a training."""
    from benchmarks import reliability_server_kills

    return reliability_server_kills.measure(args.count, args.seed, args.work, args.fresh)


def moments(args: argparse.Namespace) -> Section:
    """Interrupts a training in every way."""
    from benchmarks import reliability_moments

    return reliability_moments.measure(args.only, args.work, args.fresh)


def paths(args: argparse.Namespace) -> Section:
    """Attempts to leave the allowed folders."""
    from benchmarks import reliability_paths

    return reliability_paths.measure(args.work)


COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace], Section | str], str, int]] = {
    "kills": (kills, "SIGKILLs of a training", 200),
    "server-kills": (server_kills, "SIGKILLs of a ComfyUI server", 10),
    "fuzz": (fuzz, "damaged inputs", 50_000),
    "trainings": (trainings, "trainings in one ComfyUI server", 200),
    "moments": (moments, "cancels, full disks and the like, and what the user sees", 0),
    "paths": (paths, "attempts to reach outside of the allowed folders", 0),
}
"""name -> (measurement, in words, how many by default; 0 where the number is fixed)."""

WITHOUT_COMFYUI = ("kills",)


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` of its result is one of COMMANDS, or "render"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RELIABILITY, help="JSON file (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for journals (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="write the page from the JSON")
    made = {}
    for name, (_, words, count) in COMMANDS.items():
        made[name] = commands.add_parser(name, help=words)
        made[name].add_argument("--seed", type=int, default=0)
        made[name].add_argument("--fresh", action="store_true", help="throw away what an earlier call has measured")
        if count:
            made[name].add_argument("--count", type=int, default=count)
    made["kills"].add_argument("--steps", type=int, default=60, help="of each run")
    made["fuzz"].add_argument("--core", action="store_true", help="without the kinds that need ComfyUI")
    made["fuzz"].add_argument("--jobs", type=int, default=1, help="worker processes at a time")
    made["fuzz"].add_argument("--only", metavar="KIND:NUMBER", help="one input again, with its traceback")
    made["moments"].add_argument("--only", default="", metavar="NAME", help="scenarios whose name begins like this")
    return parser


def main() -> int:
    """Runs the command of the arguments; 1 if something was not as it must be, else 0."""
    args = make_parser().parse_args()
    if args.command == "render":
        print(render(args.results))
        return 0
    found = COMMANDS[args.command][0](args)
    if isinstance(found, str):
        print(found)
        return 0
    section = measured_here(found, *([] if args.command in WITHOUT_COMFYUI else [comfyui_version()]))
    record(section, args.results)
    print(section.to_markdown())
    return 0 if section.passed else 1


if __name__ == "__main__":
    sys.exit(main())
