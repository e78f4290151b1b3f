"""`python -m dopsd_core compare`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ...config import ConfigError
from ...demo.model_files import PARENT_FILE, WEIGHTS
from ...files.atomic import write_atomic
from ...text import printable
from .arguments import REGIMES
from .experiment import Plan, TrialRunner, models_fingerprint, run_plan, tune
from .methods import PRESETS, Method, chosen_methods
from .report import Grid, grids
from .sheet import draw_comparison

RESULT_NAME = "comparison.json"
SHEET_NAME = "comparison.png"


def run_compare(args: argparse.Namespace) -> int:
    """Runs the comparison and writes comparison.json, comparison.md and comparison.png to `args.output`.

    Raises:
        ConfigError: a method is not valid.
        FileNotFoundError: an own method, or the reference, trains the undistilled model, which is not there.
    """
    if "work" in args.regimes and len(args.regimes) > 1:
        raise ConfigError(("--regimes work is measured alone: leave the other regimes out",))
    methods = _that_can_run(chosen_methods(args.preset, args.only, args.method, args.reference), args.preset)
    plan = Plan(
        methods=methods,
        concepts=tuple(range(args.first_concept, args.first_concept + args.concepts)),
        seeds=tuple(range(args.seeds)),
        style=args.style,
        steps=args.steps,
        regimes=tuple(regime for regime in REGIMES if regime in args.regimes),
        level=args.level,
        max_steps=args.max_steps,
        check_every=args.check_every,
        work=args.work,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    fingerprint = models_fingerprint(any(method.undistilled for method in methods))
    tuned: dict[str, dict[str, object]] = {}
    with tqdm(unit="run") as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.n = done
            bar.refresh()

        with TrialRunner(args.output, args.jobs, fingerprint, show, style=args.style) as runner:
            if args.tune:
                methods, tried = tune(plan, runner, args.tune, tuple(args.rates))
                plan = Plan(**{**vars(plan), "methods": methods})
                tuned = {
                    name: {f"{rate:g}": dict(scores) for rate, scores in rows.items()} for name, rows in tried.items()
                }
            found = run_plan(plan, runner)
    tables = grids(args.preset, plan, found)
    outcomes = {
        regime: [asdict(o) for rows in rows.values() for row in rows for o in row] for regime, rows in found.items()
    }
    result = {
        "preset": args.preset,
        "plan": {**asdict(plan), "methods": [_described(method, plan.steps) for method in plan.methods]},
        "tuned": tuned,
        "tables": [asdict(table) for table in tables],
        "outcomes": outcomes,
    }
    _write(args.output, result, tables)
    draw_comparison(plan, found, args.output).save(args.output / SHEET_NAME)
    sys.stdout.write(printable("\n".join(table.to_markdown() for table in tables)) + f"\n{args.output / SHEET_NAME}\n")
    return 0


def load_grids(folder: Path) -> tuple[list[Grid], dict[str, object]]:
    """(the tables, everything else) of a comparison that was written to `folder`."""
    result = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    tables = [
        Grid(t["key"], t["title"], tuple(t["columns"]), tuple(map(tuple, t["rows"])), tuple(t["notes"]))
        for t in result.pop("tables")
    ]
    return tables, result


def _write(output: Path, result: dict[str, object], tables: Sequence[Grid]) -> None:
    write_atomic(output / RESULT_NAME, (json.dumps(result, indent=2) + "\n").encode())
    write_atomic(output / "comparison.md", "\n".join(table.to_markdown() for table in tables).encode())


def _described(method: Method, steps: int) -> dict[str, object]:
    config = json.loads(method.config(steps, 0).to_json())
    return {"name": method.name, "title": method.title, "undistilled": method.undistilled, "config": config}


def _that_can_run(methods: Sequence[Method], preset: str) -> tuple[Method, ...]:
    """Without those of the preset that need the undistilled model, if it is not there.

    Raises:
        FileNotFoundError: the reference, which is first, is one of them.
    """
    if (WEIGHTS / PARENT_FILE).exists():
        return tuple(methods)
    lost = [method for method in methods if method.undistilled and method in PRESETS[preset]]
    if methods[0] in lost:
        raise FileNotFoundError(
            f"--reference {methods[0].name} trains the undistilled demo model {PARENT_FILE}, which is not there; "
            "choose another"
        )
    for method in lost:
        sys.stdout.write(f"{method.name} is left out: the undistilled demo model {PARENT_FILE} is not there\n")
    return tuple(method for method in methods if method not in lost)
