"""Tables of a comparison: means, and differences from the reference, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...metrics.intervals import nested_bootstrap
from ..evaluate import TITLES
from .experiment import Outcomes, Plan
from .methods import REFERENCES
from .trials import outcome_values

_COST = ("steps", "seconds")
"""Figures under their own names, as all those that `TITLES` lacks."""


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        key: names it.
        title: its heading.
        columns: titles; the first is of the rows' names.
        rows: texts.
        notes: sentences below it.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """Heading, table and notes."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *self.notes]) + "\n"


_HEADINGS = {
    "steps": "equal steps",
    "time": "equal wall time",
    "error": "equal concept error",
    "work": "equal work",
}

_LEFT_OUT = {"work": ("prompt_following", "frechet_trigger", "prior_error", "names_wrong", "forwards")}
"""By regime: its tables have other columns, and would be too wide."""


def grids(name: str, plan: Plan, found: dict[str, Outcomes], *, has_costs: bool = True) -> list[Grid]:
    """Two tables per regime: means, and paired differences from the first method.

    Args:
        name: of the preset.
        has_costs: whether the steps and seconds of the runs are in the tables.
    """
    made = []
    titles = {method.name: method.title for method in (*REFERENCES, *plan.methods)}
    for regime, outcomes in found.items():
        if regime not in plan.regimes:
            continue
        heading = f"{name.capitalize()}, {_HEADINGS[regime]}"
        left_out = (*_LEFT_OUT.get(regime, ()), *(() if has_costs else _COST))
        figures = [figure for figure in figures_of(outcomes) if figure not in left_out]
        columns = ("", *(TITLES.get(figure, figure) for figure in figures))
        rows = [(titles[m], *(_mean(values(outcomes[m], figure), figure) for figure in figures)) for m in outcomes]
        notes = _notes(plan, regime, outcomes, has_costs)
        made.append(Grid(f"compare-{name}-{regime}", heading, columns, tuple(rows), notes))
        reference, *others = [method.name for method in plan.methods]
        rows = [
            (titles[m], *(_difference(values(outcomes[m], f) - values(outcomes[reference], f), f) for f in figures))
            for m in others
        ]
        paired = (
            f"Differences from {titles[reference]} on the same concept, seed and noise. Bold: the interval excludes 0."
        )
        heading = f"{heading}: differences from {titles[reference]}"
        made.append(Grid(f"compare-{name}-{regime}-differences", heading, columns, tuple(rows), (paired,)))
    return made


def figures_of(outcomes: Outcomes) -> list[str]:
    """The names of the figures, those of `TITLES` first and costs last."""
    names = list(outcome_values(next(iter(outcomes.values()))[0][0]))
    known = [name for name in TITLES if name in names]
    return [*known, *(name for name in names if name not in TITLES and name not in _COST), *_COST]


def values(rows: Sequence[Sequence[object]], figure: str) -> Tensor:
    """A figure of every outcome, [concepts, seeds]."""
    return torch.tensor([[outcome_values(outcome)[figure] for outcome in row] for row in rows], dtype=torch.float64)  # type: ignore[arg-type]


def _notes(plan: Plan, regime: str, outcomes: Outcomes, has_costs: bool) -> tuple[str, ...]:
    concepts, seeds = len(plan.concepts), len(plan.seeds)
    of_each = "one seed" if seeds == 1 else f"{seeds} seeds"
    about = f"Means with 95 % bootstrap intervals over {concepts} concepts and {of_each} of each."
    rates = "; ".join(f"{m.title}: {m.config(plan.steps, 0).optimizer.lr:g}" for m in plan.methods)
    notes = [about, f"Learning rates: {rates}."]
    if regime == "work":
        notes.append(
            f"Training stops at {plan.work} forwards of the untouched model on one image; a backward counts by its "
            "FLOPs. No warm-up. gap: to the untouched model that sees a target, on unseen prompts along the model's "
            "own steps, relative to before training; gap and error at a part of the work are measured on some prompts."
        )
    if has_costs and regime != "work":
        notes.append("Seconds: of class images, and the steps times the median time of one in the timings.")
    if regime == "error":
        total = concepts * seeds
        reached = {m.title: sum(o.reached for row in outcomes[m.name] for o in row) for m in plan.methods}
        short = ", ".join(f"{title} {count} of {total}" for title, count in reached.items() if count < total)
        notes.append(
            f"Training stops at a concept error of {plan.level:g}, measured every {plan.check_every} steps on part "
            f"of the prompts, and at {plan.max_steps} steps at the latest."
            + (f" Reached by: {short}; by all other runs of the others." if short else " Reached by every run.")
        )
    return tuple(notes)


def _mean(figures: Tensor, figure: str) -> str:
    if _is_one_timing(figures, figure):
        return _number(float(figures.mean()))
    found = nested_bootstrap(figures)
    return f"{_number(found.mean)} [{_number(found.low)}, {_number(found.high)}]"


def _difference(differences: Tensor, figure: str) -> str:
    if _is_one_timing(differences, figure):
        return _signed(float(differences.mean()))
    found = nested_bootstrap(differences)
    text = f"{_signed(found.mean)} [{_signed(found.low)}, {_signed(found.high)}]"
    return f"**{text}**" if found.excludes_zero else text


def _is_one_timing(figures: Tensor, figure: str) -> bool:
    """Whether these are seconds by one timing for all runs, which have no interval."""
    return figure == "seconds" and bool((figures == figures.flatten()[0]).all())


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) > 1e-6 else "0"


def _signed(value: float) -> str:
    return f"+{_number(value)}" if value > 1e-6 else _number(value)
