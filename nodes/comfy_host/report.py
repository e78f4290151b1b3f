"""The summary of a run of D-OPSD Train LoRA: notes on the node, and report.json in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...dopsd_core.files.atomic import write_atomic
from ...dopsd_core.text import printable
from ...dopsd_core.training.unseen_gap import BestStep
from .paths import shown

REPORT_NAME = "report.json"

State = Literal["finished", "interrupted", "failed"]
"""How a run ended."""

log = logging.getLogger("dopsd")


class Notes(logging.Handler):
    """Notes for the user about a run, one line each, without duplicates."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        super().__init__(logging.WARNING)
        self._lines: dict[str, None] = {}
        self.add(*lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The notes in the order in which they were added."""
        return tuple(self._lines)

    def add(self, *lines: str) -> None:
        """Adds the lines that are new."""
        self._lines.update(dict.fromkeys(map(printable, lines)))

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a warning of the core as a note."""
        self.add(record.getMessage())

    @contextmanager
    def with_warnings(self) -> Iterator[None]:
        """Adds the core's warnings inside the `with`."""
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """How a run ended.

    Attributes:
        state: how it ended.
        step: optimizer steps done in total.
        steps: optimizer steps wanted.
        relative_gap: last measured gap to the teacher on training captions, over the one before training; or None.
        heldout_relative_gap: the same on the unseen prompt.
        relative_gap_by_concept: the first by trigger, where there are several concepts.
        best_step: the step with the smallest gap on the unseen prompt, of those with a LoRA file if there are any; None
            if it was not measured.
        best_heldout_relative_gap: the gap after that step.
        best_lora: name of its LoRA file in the run's folder; empty if none is kept.
        modules: number of layers with a LoRA.
        parameters: number of trained parameters.
        base_model: file name of the MODEL.
        trigger: trigger word of the dataset.
        teacher: mode of the teacher.
        memory: the memory preset that was used.
        notes: for the user, one line each: inputs that were not used, changes to save memory, warnings.
        error: the sentence of a failure.
    """

    state: State
    step: int
    steps: int
    relative_gap: float | None
    heldout_relative_gap: float | None
    relative_gap_by_concept: Mapping[str, float]
    best_step: int | None
    best_heldout_relative_gap: float | None
    best_lora: str
    modules: int
    parameters: int
    base_model: str
    trigger: str
    teacher: str
    memory: str
    notes: tuple[str, ...]
    error: str = ""

    def write(self, folder: Path) -> None:
        """Writes report.json; a failure is only logged, since the LoRA matters more."""
        facts = {name: _printable(value) for name, value in dataclasses.asdict(self).items()}
        text = json.dumps(facts, indent=2) + "\n"
        try:
            write_atomic(folder / REPORT_NAME, text.encode())
        except OSError as error:
            log.error("%s cannot be written: %s", folder / REPORT_NAME, error)


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def gap_line(relative: float, heldout: float | None) -> str:
    """The gap to the teacher as text, the same everywhere."""
    unseen = f", unseen prompt {heldout:.3f}" if heldout is not None else ""
    return f"gap to the teacher {relative:.3f}{unseen}  (1 = before training)"


def concept_lines(gaps: Mapping[str, float]) -> list[str]:
    """The gaps of several concepts as a line; none for one concept."""
    return [f"by concept: {', '.join(f'{name} {gap:.3f}' for name, gap in gaps.items())}"] if gaps else []


def best_line(best: BestStep, last: int) -> str:
    """The step with the smallest gap on the unseen prompt and its file; "" if it is the last one and has none."""
    file = shown(best.path) if best.path else ""
    return best.sentence(last, file, "set save_every in Training Settings")
