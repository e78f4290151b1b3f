"""Step reports, the gap to the teacher, and a log that survives a kill.

The loss of supervised training says little about quality. Self-distillation has a meaningful metric: the distance of
the student's velocities from its teacher's along the student's own rollout, on fixed noise, relative to the distance
before training. It is 1 before training, and 0 if the student equals its teacher.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..files.atomic import write_atomic
from ..files.disk import writing

LOG_NAME = "train.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """An optimizer step, or for `step` 0 the state before training (without loss).

    Attributes:
        step: optimizer steps done.
        loss: mean loss of the training batches. Prior anchor batches count only if there are no others.
        metrics: further metrics of the objective by name, for the same batches. Objectives that compare velocities
            have "gap", the RMS distance of student and target, "cosine", and "norm_ratio", student over target.
        relative_gap: gap to the teacher on fixed noise, relative to before training; None if not measured.
        heldout_relative_gap: the same for the held-out caption.
        lr: learning rate of this step.
        grad_norm: gradient norm before clipping.
        anchors: number of prior anchor batches in this step.
        loss_scale: factor of the losses for networks in fp16; None for others.
        overflows: how often the step was repeated with half the scale because a gradient overflowed; None for others.
        seconds: wall time of this step, without probe and checkpoint.
        gpu_gb: memory in use on the device after this step, in 10^9 bytes; None on a CPU.
        ram_gb: the same of the process in RAM; None if unknown.
    """

    step: int
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    relative_gap: float | None = None
    heldout_relative_gap: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    anchors: int = 0
    loss_scale: float | None = None
    overflows: int | None = None
    seconds: float | None = None
    gpu_gb: float | None = None
    ram_gb: float | None = None

    def __post_init__(self) -> None:
        if taken := sorted(self.metrics.keys() & _FIELDS):
            raise ValueError(f"an objective's metric may not be named {taken[0]}, which is reserved in the log")

    def to_row(self) -> str:
        """A line of JSON with all measured values; metrics are included under their own names."""
        values: dict[str, object] = {name: getattr(self, name) for name in _FIELDS}
        row = {"step": self.step, "loss": self.loss, **self.metrics, **values}
        return json.dumps({name: value for name, value in row.items() if _is_logged(value)}) + "\n"

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> StepReport:
        """Parses a line. Numbers with unknown names are metrics; unknown texts and flags are ignored.

        Raises:
            TypeError: there is no step, a known value is not a number, or any value is a list or an object.
        """
        for name, value in row.items():
            if isinstance(value, list | dict) or (name in _FIELDS and not (value is None or _is_number(value))):
                raise TypeError(f"{name} is not a number")
        known: dict[str, Any] = {name: value for name, value in row.items() if name in _FIELDS}
        others = {name: float(value) for name, value in row.items() if name not in _FIELDS and _is_number(value)}
        return cls(**known, metrics=others)


_FIELDS = tuple(name for name in StepReport.__dataclass_fields__ if name != "metrics")


_OF_CONCEPT = "relative_gap of "


def gaps_by_concept(metrics: Mapping[str, float]) -> dict[str, float]:
    """The relative gap of each concept by its trigger, from a report's metrics; empty unless there are several."""
    found = {name: value for name, value in metrics.items() if name.startswith(_OF_CONCEPT)}
    return {name.removeprefix(_OF_CONCEPT): value for name, value in found.items()}


@dataclass(frozen=True)
class Gaps:
    """Gaps to the teacher on fixed noise: RMS distances of velocities.

    Attributes:
        train: mean over training pairs.
        heldout: gap of the held-out pair; None if there is none.
        concepts: (trigger, mean over its training pairs) of each concept, if there are several.
    """

    train: float
    heldout: float | None
    concepts: tuple[tuple[str, float], ...] = ()

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Gaps:
        """From the list of a checkpoint, which lacks the concepts in older ones."""
        train, heldout, *concepts = values
        return cls(train, heldout, tuple((name, gap) for name, gap in concepts[0]) if concepts else ())

    def relative_to(self, start: Gaps) -> tuple[float | None, float | None]:
        """Both gaps relative to those at the start; None if there is nothing to compare."""
        return _ratio(self.train, start.train), _ratio(self.heldout, start.heldout)

    def metrics_of_concepts(self, start: Gaps) -> dict[str, float]:
        """The relative gap of each concept, as metrics for the log."""
        before = dict(start.concepts)
        ratios = {name: _ratio(gap, before.get(name)) for name, gap in self.concepts}
        return {f"{_OF_CONCEPT}{name}": ratio for name, ratio in ratios.items() if ratio is not None}


class RunLog:
    """A JSONL file of step reports that contains exactly the steps up to the state of the run.

    Opened at the step of a checkpoint, it drops later lines and a line that was truncated by a kill.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log of a run at `step`; -1 clears it.

        Raises:
            DiskError: it cannot be read or written.
        """
        self.path = path
        with writing(path):
            kept = [report for report in read_log(path) if report.step <= step]
        write_atomic(path, "".join(report.to_row() for report in kept).encode())
        with writing(path):
            self._file = path.open("ab", buffering=0)  # a buffer would retry the write on close

    def append(self, report: StepReport) -> None:
        """Appends a line and passes it to the operating system.

        Raises:
            DiskError: it could not be written completely.
        """
        row = report.to_row().encode()
        with writing(self.path, len(row)):
            if self._file.write(row) != len(row):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Flushes all lines to disk; called before a checkpoint is written."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[StepReport]:
    """The reports of a log in order of their steps; empty if there is no file.

    Stops at the first line that cannot be parsed.
    """
    if not path.exists():
        return []
    reports: list[StepReport] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            report = StepReport.from_row(json.loads(line))
        except (ValueError, TypeError, AttributeError, RecursionError):
            break
        if not isinstance(report.step, int) or (reports and report.step <= reports[-1].step):
            break
        reports.append(report)
    return reports


def curve(reports: Sequence[StepReport], value: Callable[[StepReport], float | None]) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it was measured: `curve(read_log(path), lambda r: r.relative_gap)`."""
    points = [(report.step, number) for report in reports if (number := value(report)) is not None]
    return [step for step, _ in points], [number for _, number in points]


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the batches that have it."""
    names = dict.fromkeys(name for batch in metrics for name in batch)
    known = {name: [batch[name] for batch in metrics if name in batch] for name in names}
    return {name: sum(values) / len(values) for name, values in known.items()}


def _ratio(now: float | None, start: float | None) -> float | None:
    return now / start if now is not None and start is not None and start > 0 else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_logged(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
