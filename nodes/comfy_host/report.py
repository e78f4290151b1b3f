"""How a run of D-OPSD Train LoRA went: on the node, and as report.json in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...dopsd_core.files.atomic import write_atomic
from ...dopsd_core.text import printable

REPORT_NAME = "report.json"

State = Literal["finished", "interrupted", "failed"]
"""How a run ended."""

log = logging.getLogger("dopsd")


class Notes(logging.Handler):
    """What the user is to know about a run, one line each, every line once."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        super().__init__(logging.WARNING)
        self._lines: dict[str, None] = {}
        self.add(*lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._lines)

    def add(self, *lines: str) -> None:
        """Appends those that are new."""
        self._lines.update(dict.fromkeys(map(printable, lines)))

    def emit(self, record: logging.LogRecord) -> None:
        """A warning of the core is a note."""
        self.add(record.getMessage())

    @contextmanager
    def with_warnings(self) -> Iterator[None]:
        """Adds what the core warns of inside the `with`."""
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The end of a run, whatever ended it.

    Attributes:
        state: how it ended. error: the sentence of a failure.
        step: optimizer steps done in all, of `steps`.
        relative_gap, heldout_relative_gap: gap to the teacher over the one before training, last measured, on training
            captions and on the unseen prompt; None where not measured.
        modules, parameters: size of the LoRA.
        base_model, trigger, teacher, memory: what it was trained with; memory is the preset that was planned with.
        notes: for the user, one line each: what was given and not used, what was traded, what went wrong.
    """

    state: State
    step: int
    steps: int
    relative_gap: float | None
    heldout_relative_gap: float | None
    modules: int
    parameters: int
    base_model: str
    trigger: str
    teacher: str
    memory: str
    notes: tuple[str, ...]
    error: str = ""

    def write(self, folder: Path) -> None:
        """Writes report.json; where that fails, the log says so, since the LoRA matters more."""
        facts = {name: _printable(value) for name, value in dataclasses.asdict(self).items()}
        text = json.dumps(facts, indent=2) + "\n"
        try:
            write_atomic(folder / REPORT_NAME, text.encode())
        except OSError as error:
            log.error("%s cannot be written: %s", folder / REPORT_NAME, error)


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def gap_line(relative: float, heldout: float | None) -> str:
    """The gap to the teacher, as it is shown everywhere."""
    unseen = f", unseen prompt {heldout:.3f}" if heldout is not None else ""
    return f"gap to the teacher {relative:.3f}{unseen}  (1 = before training)"
