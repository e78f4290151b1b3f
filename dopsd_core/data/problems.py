"""What is wrong with a dataset, by file and line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..text import printable

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """Something wrong at a place of the dataset; an error forbids training, a warning does not."""

    severity: Severity
    file: Path
    line: int | None
    message: str

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return printable(f"{self.severity}: {place}: {self.message}")


@dataclass
class Problems:
    """The problems found so far, in the order of the data."""

    found: list[Problem] = field(default_factory=list)

    def add(self, severity: Severity, file: Path, line: int | None, message: str) -> None:
        """Notes a problem."""
        self.found.append(Problem(severity, file, line, message))

    def error(self, file: Path, line: int | None, message: str) -> None:
        """Notes a problem that forbids training."""
        self.add("error", file, line, message)

    def warning(self, file: Path, line: int | None, message: str) -> None:
        """Notes a problem that training lives with."""
        self.add("warning", file, line, message)
