"""Comparisons of training methods on the demo model, for docs/results.md.

    python -m benchmarks.compare --preset methods --output build/comparison-methods
    python -m benchmarks.compare --preset methods --style --output build/comparison-styles
    python -m benchmarks.compare --preset ablations --output build/comparison-ablations
    python -m benchmarks.compare --preset ablations --only velocity --apart loss --output build/comparison-loss

Runs `python -m dopsd_core compare` with the same arguments, which resumes a comparison that was begun; writes its tables as sections of docs/results.md, and its contact sheet as docs/comparison_<preset>.png. Comparisons of styles, and with another number of steps, have sections and sheets of their own; `--apart NAME` gives them to any other, where these tables would replace those of the whole preset.
"""  # noqa: E501

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.report import RESULTS, ROOT, Section, Table, measured_here, record
from dopsd_core.arguments import parse_args
from dopsd_core.standalone.comparison.command import SHEET_NAME, load_grids
from dopsd_core.standalone.comparison.report import Grid


def sections(preset: str, grids: Sequence[Grid], arguments: Sequence[str]) -> list[Section]:
    """A section per table; the first one shows the contact sheet."""
    command = f"python -m benchmarks.compare {shlex.join(_without(arguments, '--output'))}"
    grids = [_named(grid, preset, _variety(arguments)) for grid in grids]
    made = [Section(g.key, g.title, command, None, Table(g.columns, g.rows), g.notes) for g in grids]
    if not _is_drawn(grids[0]):
        return made
    image = f"![A row per method, the same prompts and noise in each]({_sheet(preset, arguments)})"
    return [replace(made[0], notes=(*made[0].notes, image)), *made[1:]]


def _is_drawn(grid: Grid) -> bool:
    """The sheet shows the images at equal steps, or at equal work."""
    return grid.key.endswith(("-steps", "-work"))


def _variety(arguments: Sequence[str]) -> str:
    """What makes it another comparison of the preset, with its own place on the page: "styles", "240 steps", a name."""
    args = parse_args(["compare", *_without(arguments, "--apart")])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--apart", default="")
    apart = parser.parse_known_args(list(arguments))[0].apart
    steps = f"{args.steps} steps" * (args.steps != parse_args(["compare"]).steps)
    return " ".join(filter(None, ("styles" * args.style, steps, apart)))


def _named(grid: Grid, preset: str, variety: str) -> Grid:
    if not variety:
        return grid
    key = grid.key.replace(f"compare-{preset}", f"compare-{preset}-{variety.replace(' ', '-')}", 1)
    return replace(grid, key=key, title=grid.title.replace(",", f", {variety},", 1))


def _sheet(preset: str, arguments: Sequence[str]) -> str:
    return "_".join(filter(None, ("comparison", preset, *_variety(arguments).split()))) + ".png"


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without one that has a value: the folder says nothing about the figures, for instance."""
    kept, skips = [], False
    for argument in arguments:
        if not skips and argument.partition("=")[0] != name:
            kept.append(argument)
        skips = argument == name
    return kept


def main() -> None:
    """Runs the comparison and writes its sections and its contact sheet."""
    arguments = sys.argv[1:]
    of_compare = _without(arguments, "--apart")
    args = parse_args(["compare", *of_compare])
    subprocess.run([sys.executable, "-m", "dopsd_core", "compare", *of_compare], check=True)
    grids, _ = load_grids(args.output)
    if _is_drawn(grids[0]):
        shutil.copyfile(args.output / SHEET_NAME, ROOT / "docs" / _sheet(args.preset, arguments))
    for section in sections(args.preset, grids, arguments):
        record(measured_here(section, f"{args.jobs} jobs"), RESULTS)


if __name__ == "__main__":
    main()
