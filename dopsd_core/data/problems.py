"""Problems of a dataset, by file and line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..text import printable

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """A problem in the dataset.

    Attributes:
        severity: an error prevents training, a warning does not.
        file: the file with the problem.
        line: the line in it, if any.
        message: the problem and what to do.
    """

    severity: Severity
    file: Path
    line: int | None
    message: str

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return printable(f"{self.severity}: {place}: {self.message}")


@dataclass
class Problems:
    """Collects problems.

    Attributes:
        found: the problems so far, in the order of the data.
    """

    found: list[Problem] = field(default_factory=list)

    def add(self, severity: Severity, file: Path, line: int | None, message: str) -> None:
        """Adds a problem."""
        self.found.append(Problem(severity, file, line, message))

    def error(self, file: Path, line: int | None, message: str) -> None:
        """Adds a problem that prevents training."""
        self.add("error", file, line, message)

    def warning(self, file: Path, line: int | None, message: str) -> None:
        """Adds a problem that does not prevent training."""
        self.add("warning", file, line, message)
