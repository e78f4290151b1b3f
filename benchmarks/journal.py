"""What a measurement of hours has done so far, on disk and on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import code_digest, demo_model_digest
from dopsd_core.files.atomic import write_atomic


@dataclass
class Journal:
    """What a measurement has done so far, a JSON object per line; a kill costs at most the last line.

    The first line names the code and the demo model that were measured: what others did is no part of a measurement.

    Attributes:
        path: of the file.
        rows: the lines after the first.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, *, fresh: bool = False) -> Journal:
        """The journal at `path` with its rows; `fresh` throws older ones away."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head, kept = {"code": code_digest(), "model": demo_model_digest()}, []
        lines = [] if fresh or not path.exists() else path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            try:
                kept.append(json.loads(line))
            except ValueError:  # cut in two
                break
        rows = kept[1:] if kept[:1] == [head] else []
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in (head, *rows)).encode())
        return cls(path, rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it is out of this process when the call returns."""
        self.rows.append(dict(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Progress:
    """A line on the terminal now and then: how much is done, and how long the rest takes."""

    def __init__(self, what: str, total: int, done: int = 0, every: float = 10.0) -> None:
        self._what, self._total, self._first, self._every = what, total, done, every
        self._began = self._shown = time.monotonic()

    def show(self, done: int, note: str = "") -> None:
        """Prints when the last line is old enough, and at the end."""
        now = time.monotonic()
        if now - self._shown < self._every and done < self._total:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = (self._total - done) / rate / 60 if rate else float("inf")
        print(f"{self._what}: {done} of {self._total}, {rate:.2g}/s, {left:.0f} min left  {note}", flush=True)
