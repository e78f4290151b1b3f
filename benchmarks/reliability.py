"""What the pack survives: kills, bad input, load, cancels, full disks, hostile paths.

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
from pathlib import Path

from benchmarks.reliability_report import RESULTS, WORK, Section, measured_here, record, render


def kills(args: argparse.Namespace) -> Section:
    from benchmarks import reliability_kills

    return reliability_kills.measure(args.count, args.steps, args.seed, args.work, args.fresh)


def fuzz(args: argparse.Namespace) -> Section | str:
    from benchmarks import reliability_fuzz

    kinds = reliability_fuzz.core_kinds() if args.core else reliability_fuzz.all_kinds()
    if args.only:
        return reliability_fuzz.show(kinds, args.only, args.seed, args.work)
    return reliability_fuzz.measure(args.count, args.seed, args.jobs, args.work, args.fresh, kinds)


def trainings(args: argparse.Namespace) -> Section:
    from benchmarks import reliability_load

    return reliability_load.measure(args.count, args.work, args.fresh)


def server_kills(args: argparse.Namespace) -> Section:
    from benchmarks import reliability_server_kills

    return reliability_server_kills.measure(args.count, args.seed, args.work, args.fresh)


def moments(args: argparse.Namespace) -> Section:
    from benchmarks import reliability_moments

    return reliability_moments.measure(args.only, args.work, args.fresh)


def paths(args: argparse.Namespace) -> Section:
    from benchmarks import reliability_paths

    return reliability_paths.measure(args.work)


def make_parser() -> argparse.ArgumentParser:
    """The parser; `measure` of its result is the function of the command, None for `render`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for journals (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="write the page from the JSON").set_defaults(measure=None)
    one = commands.add_parser("kills", help="SIGKILLs of a training")
    one.set_defaults(measure=kills)
    one.add_argument("--count", type=int, default=200)
    one.add_argument("--steps", type=int, default=60, help="of each run")
    bad = commands.add_parser("fuzz", help="damaged inputs")
    bad.set_defaults(measure=fuzz)
    bad.add_argument("--count", type=int, default=50_000)
    bad.add_argument("--core", action="store_true", help="without the kinds that need ComfyUI")
    bad.add_argument("--jobs", type=int, default=1, help="worker processes at a time")
    bad.add_argument("--only", metavar="KIND:NUMBER", help="one input again, with its traceback")
    many = commands.add_parser("trainings", help="trainings in one ComfyUI server")
    many.set_defaults(measure=trainings)
    many.add_argument("--count", type=int, default=200)
    server = commands.add_parser("server-kills", help="SIGKILLs of a ComfyUI server")
    server.set_defaults(measure=server_kills)
    server.add_argument("--count", type=int, default=10)
    bad_times = commands.add_parser("moments", help="cancels, full disks and the like, and what the user sees")
    bad_times.set_defaults(measure=moments)
    bad_times.add_argument("--only", default="", metavar="NAME", help="scenarios whose name begins like this")
    outside = commands.add_parser("paths", help="attempts to reach outside of the allowed folders")
    outside.set_defaults(measure=paths)
    for command in (one, bad, many, server, bad_times, outside):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--fresh", action="store_true", help="throw away what an earlier call has measured")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    if args.measure is None:
        print(render(args.results))
        return 0
    found = args.measure(args)
    if isinstance(found, str):
        print(found)
        return 0
    section = measured_here(found)
    record(section, args.results)
    print(section.to_markdown())
    return 0 if section.passed else 1


if __name__ == "__main__":
    sys.exit(main())
